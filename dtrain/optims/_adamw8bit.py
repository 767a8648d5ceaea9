"""Live AdamW8bit of bitsandbytes, and its 8 bits as the fp32 that strategies show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from bitsandbytes import functional
from bitsandbytes.optim.optimizer import Optimizer2State

from dtrain.optims.packed import AbstractPacked

if TYPE_CHECKING:
    from dtrain.optims.adamw8bit import AdamW8bit

BLOCK = 256
_OURS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Our names of the library's state1 and state2."""


def make(groups: list[dict[str, Any]], how: AdamW8bit) -> torch.optim.Optimizer:
    # Of a sharded parameter a rank may own nothing, and a kernel would be started on nothing.
    for group in groups:
        group["params"] = [one for one in group["params"] if one.numel()]
    return _AdamW8bit(groups, how)


@final
class _AdamW8bit(Optimizer2State, AbstractPacked):
    def __init__(self, groups: list[dict[str, Any]], how: AdamW8bit) -> None:
        super().__init__("adam", groups, how.lr, how.betas, how.eps, how.weight_decay, optim_bits=8,
                         is_paged=how.paged)  # fmt: skip

    @contextlib.contextmanager
    def opened(self, param: torch.Tensor) -> Iterator[Mapping[str, torch.Tensor]]:
        state = self.state.get(param)
        if not state:
            yield {}
            return
        mine = {name: self._read(state, key).view(param.shape) for name, key in _OURS.items()}
        further = {name: one for name, one in state.items() if name.startswith("exp_avg")}
        yield mine | further
        for name, key in _OURS.items():
            if not torch.equal(self._read(state, key).view(param.shape), mine[name]):
                self._write(state, key, mine[name])

    def make(self, param: torch.Tensor, names: Sequence[str], updates: int) -> None:
        gindex, pindex, group = next((i, k, group) for i, group in enumerate(self.param_groups)
                                     for k, one in enumerate(group["params"]) if one is param)  # fmt: skip
        self.init_state(group, param, gindex, pindex)
        self.state[param]["step"] = updates
        self.state[param] |= {name: torch.zeros_like(param) for name in names if name not in _OURS}

    @staticmethod
    def _read(state: dict[str, Any], key: str) -> torch.Tensor:
        kept: torch.Tensor = state[f"state{key}"]
        if kept.dtype == torch.float32:
            return kept.cpu().clone()
        found: torch.Tensor = functional.dequantize_blockwise(
            kept, absmax=state[f"absmax{key}"], code=state[f"qmap{key}"], blocksize=BLOCK
        )
        return found.cpu()

    @staticmethod
    def _write(state: dict[str, Any], key: str, value: torch.Tensor) -> None:
        kept: torch.Tensor = state[f"state{key}"]
        if kept.dtype == torch.float32:
            kept.copy_(value)
            return
        codes, scales = packed(value.reshape(-1), state[f"qmap{key}"].cpu())
        kept.copy_(codes.view(kept.shape))
        state[f"absmax{key}"].copy_(scales)


def packed(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of `levels`, which go up to 1, for each of `values` [N], as uint8, and the scale of each block.

    Values that were such levels times a scale are found again, which the library's own rounding does not do: where the
    largest of a block was negative it has been rounded to a level that is not -1, and so tells another scale.
    """
    num = -(-len(values) // BLOCK)
    blocks = torch.nn.functional.pad(values, (0, num * BLOCK - len(values))).view(num, BLOCK)
    between = (levels[1:] + levels[:-1]) / 2
    largest = blocks.abs().amax(1)
    tries = []
    for level in dict.fromkeys((1.0, abs(float(levels[0])) or 1.0)):
        scales = largest / level
        codes = torch.bucketize(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None], between)
        tries.append((codes, scales, (levels[codes] * scales[:, None] - blocks).square().sum(1)))
    (codes, scales, error), *others = tries
    for other, its_scales, its_error in others:
        better = its_error < error
        codes, scales = torch.where(better[:, None], other, codes), torch.where(better, its_scales, scales)
    return codes.to(torch.uint8).view(-1)[: len(values)], scales
