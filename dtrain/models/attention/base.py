"""What a back end of attention is: a way to compute it that keeps the documents of a row apart."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dtrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dtrain.models.base import Setting


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a model's attention has to do, and where."""

    device: torch.device
    dtype: torch.dtype
    """Of queries, keys and values."""
    head_dim: int
    dropout: float
    softcap: float | None
    """Scores are `softcap * tanh(score / softcap)`; None where they are not capped."""
    pluggable: bool
    """Whether the layers take any function that transformers has under a name, and hand on what it needs."""
    built_for: str | None
    """The implementation that the layers were made with and cannot change; None where they can."""

    @classmethod
    def of(cls, kind: type[PreTrainedModel], config: PretrainedConfig, setting: Setting) -> Asked:
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 1  # there are layers that count none
        dropouts = [getattr(text, key, None) or 0.0 for key in ("attention_dropout", "attn_pdrop")]
        changes = kind._can_set_attn_implementation()
        return cls(
            device=setting.device,
            dtype=setting.dtype,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dropout=max(float(one) for one in dropouts),
            softcap=getattr(text, "attn_logit_softcapping", None),
            pluggable=changes and kind._supports_attention_backend,
            built_for=None if changes else text._attn_implementation,
        )


def _nothing(positions: torch.Tensor) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    name: str
    """What `model.attention` calls it."""
    implementation: str
    """What transformers calls it."""
    lacks: Callable[[Asked], str | None]
    """Why it cannot do this here, as far as can be told without trying; None where it may."""
    flat: bool
    """Whether the rows of a micro-batch are laid end to end as one, or stay apart."""
    further: Callable[[torch.Tensor], dict[str, Any]] = _nothing
    """What the layers are given besides, made once a forward of the positions: [1, B*T] where flat, else [B, T]."""
    function: Callable[..., tuple[torch.Tensor, None]] | None = None
    """How it is computed, where that is dtrain's; None where it is transformers'."""

    def lay_out(self, tokens: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        """What a decoder is called with for tokens and positions [B, T]."""
        if self.flat:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        # An attention mask, even of ones, would have transformers ignore the positions, and documents see each other.
        return {"input_ids": tokens, "attention_mask": None, "position_ids": positions, "use_cache": False,
                **self.further(positions)}  # fmt: skip

    def install(self, decoder: PreTrainedModel) -> None:
        """Have the decoder's layers use it. Raises ModelError, or what transformers raises."""
        from transformers import AttentionInterface

        if self.function is not None:
            AttentionInterface.register(self.implementation, self.function)
        with quiet():
            decoder.set_attn_implementation(self.implementation)
        now = decoder.config._attn_implementation
        if now != self.implementation:
            raise ModelError(f"the model's layers were made for {now} alone")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice on back ends, which is for those who choose them by hand."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def bounds(positions: torch.Tensor) -> torch.Tensor:
    """Where each document of a flat row [1, N] starts, and N; int64, on the device of the positions."""
    starts = (positions[0] == 0).nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=positions.shape[1])


def cumulative(positions: torch.Tensor) -> dict[str, Any]:
    """The documents of a flat row as kernels of varying lengths want them, under transformers' names."""
    ends = bounds(positions).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def needs_halves(asked: Asked) -> str | None:
    """What kernels of flash attention are not made for."""
    if asked.device.type != "cuda":
        return "needs CUDA"
    if asked.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, not in {str(asked.dtype).removeprefix('torch.')}"
    if asked.head_dim > 256:
        return f"takes heads of up to 256 numbers, not {asked.head_dim}"
    return None


def needs_registry(asked: Asked) -> str | None:
    return None if asked.pluggable else "the model's layers take no attention from outside"
