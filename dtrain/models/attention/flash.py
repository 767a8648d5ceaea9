"""The flash-attn packages, by transformers' way of calling them."""

from __future__ import annotations

from collections.abc import Callable

from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from dtrain.models.attention.base import Asked, Backend, cumulative, needs_halves


def _lacks(package: str, available: Callable[[], bool], *, dropout: bool) -> Callable[[Asked], str | None]:
    def lacks(asked: Asked) -> str | None:
        if why := needs_halves(asked):
            return why
        # Asked for without the package, transformers would fetch a kernel from a hub.
        if not available():
            return f"{package} is not installed"
        if asked.built_for is not None:
            return f"the model's layers were made for {asked.built_for} alone"
        return "has no dropout" if asked.dropout and not dropout else None

    return lacks


FLASH_3 = Backend(
    name="flash_attention_3",
    implementation="flash_attention_3",
    lacks=_lacks("flash-attn-3", is_flash_attn_3_available, dropout=False),
    flat=True,
    further=cumulative,
)
FLASH_2 = Backend(
    name="flash_attention_2",
    implementation="flash_attention_2",
    lacks=_lacks("flash-attn", is_flash_attn_2_available, dropout=True),
    flat=True,
    further=cumulative,
)
