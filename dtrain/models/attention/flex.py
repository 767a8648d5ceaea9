"""torch's flex_attention with masks by blocks, by transformers' way of calling it; compiled on the first call."""

from __future__ import annotations

from dtrain.models.attention.base import Asked, Backend, needs_registry


def _lacks(asked: Asked) -> str | None:
    if asked.device.type == "cpu":
        return "has no backward on CPU"
    if asked.dropout:
        return "has no dropout"
    return needs_registry(asked)


FLEX = Backend(name="flex_attention", implementation="flex_attention", lacks=_lacks, flat=False)
