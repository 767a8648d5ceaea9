"""What `model.attention` may be. No torch here: specs import it."""

from __future__ import annotations

from typing import Literal

from dtrain.plan.world import Device

Attention = Literal[
    "auto",
    "flash_attention_3",
    "flash_attention_2",
    "varlen",
    "documents",
    "flex_attention",
    "document_scores",
    "sdpa",
    "eager",
]
MASKED: frozenset[Attention] = frozenset({"sdpa", "eager"})
"""Those that make a number for each pair of tokens of a row."""
_OF_CUDA: frozenset[Attention] = frozenset({"flash_attention_3", "flash_attention_2", "varlen", "flex_attention"})


def misfits(attention: Attention, device: Device) -> list[str]:
    """What is wrong with this choice on such a device, as far as can be told without torch."""
    if device == "cpu" and attention in _OF_CUDA:
        return [f"model.attention={attention}: trains on CUDA only, and device={device}; model.attention=auto takes "
                f"what works, documents is for any device"]  # fmt: skip
    return []
