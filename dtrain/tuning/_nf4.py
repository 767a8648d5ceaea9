"""Linear layers whose weights are kept in 4-bit NormalFloat (arXiv 2305.14314). Sole importer of bitsandbytes."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import nn

from dtrain.models.base import AbstractWeights

BLOCK, NESTED_BLOCK = 64, 256


@final
class Rounded(AbstractWeights):
    """The values that are computed with: those of some layers are what is left of them in 4 bits."""

    def __init__(self, base: AbstractWeights, shapes: dict[str, torch.Size], *, nested: bool) -> None:
        """`shapes`: of the weights that are kept in 4 bits, by their names."""
        self.base, self.shapes, self._nested = base, shapes, nested

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        if name not in self.shapes:
            return self.base.read(name, start, numel)
        return (
            NF4Linear.of(self.whole(name), None, nested=self._nested)
            .dense(torch.float32)
            .reshape(-1)[start : start + numel]
        )

    def whole(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.base.read(name, 0, shape.numel()).float().view(shape)


@final
class NF4Linear(nn.Module):
    """A linear layer without a parameter: what it needs are buffers, whole on every rank.

    Numbers of a block are kept as bits, so that nobody who casts a model to another precision rounds them.
    """

    def __init__(self, shape: tuple[int, int], buffers: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.bias: nn.Parameter | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: nn.Parameter | None, *, nested: bool) -> NF4Linear:
        """`weight`: (outputs, inputs), fp32. `nested`: the scales of the blocks are kept in 8 bits."""
        from bitsandbytes import functional

        where = torch.device("cuda") if torch.cuda.is_available() else weight.device
        packed, state = functional.quantize_4bit(
            weight.to(where), quant_type="nf4", blocksize=BLOCK, compress_statistics=nested
        )
        buffers = {"packed": packed, "scales": state.absmax}
        if nested:
            buffers |= {"offset": state.offset.reshape(1), "steps": state.state2.absmax, "levels": state.state2.code}
        made = cls(
            (weight.shape[0], weight.shape[1]), {name: _bits(one.to(weight.device)) for name, one in buffers.items()}
        )
        made.bias = bias
        return made

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as it is computed with: (outputs, inputs)."""
        from bitsandbytes import functional

        scales, nested = self.get_buffer("scales"), hasattr(self, "steps")
        state: Any = functional.QuantState(
            absmax=scales if nested else scales.view(torch.float32), blocksize=BLOCK, quant_type="nf4", dtype=dtype,
            shape=torch.Size((self.out_features, self.in_features)),
            code=functional.get_4bit_type("nf4", device=str(scales.device)),
        )  # fmt: skip
        if nested:
            state.nested, state.offset = True, self.get_buffer("offset").view(torch.float32)[0]
            state.state2 = functional.QuantState(
                absmax=self.get_buffer("steps").view(torch.float32), blocksize=NESTED_BLOCK, dtype=torch.float32,
                code=self.get_buffer("levels").view(torch.float32),
            )  # fmt: skip
        return functional.dequantize_4bit(self.get_buffer("packed"), state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out: torch.Tensor = _Product.apply(x.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """Keeps the 4 bits for the backward pass, not the weight that was made of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


def _bits(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.contiguous().view(torch.int32) if buffer.is_floating_point() else buffer
