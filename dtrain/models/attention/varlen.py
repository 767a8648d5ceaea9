"""torch's own flash attention over documents of varying lengths."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.models.attention.base import Asked, Backend, cumulative, needs_halves, needs_registry


def _lacks(asked: Asked) -> str | None:
    if why := needs_halves(asked) or needs_registry(asked):
        return why
    if torch.cuda.get_device_capability(asked.device) < (8, 0):
        return f"needs compute capability 8.0, and {torch.cuda.get_device_name(asked.device)} has less"
    if asked.softcap is not None:
        return "caps no scores"
    return "has no dropout" if asked.dropout else None


def _forward(  # noqa: PLR0913  as transformers calls it
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Queries, keys and values [1, heads, N, head_dim]; gives [1, N, heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # A window counts the token itself, the kernel only those before it.
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                      window_size=window, enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out[None], None


VARLEN = Backend(
    name="varlen",
    implementation="dtrain_varlen",
    lacks=_lacks,
    flat=True,
    further=cumulative,
    function=_forward,
)
