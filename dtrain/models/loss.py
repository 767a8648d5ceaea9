"""What `model.loss` may be. No torch here: specs import it."""

from __future__ import annotations

from typing import Literal

from dtrain.plan.world import Device

Loss = Literal["auto", "liger", "chunks"]


def misfits(loss: Loss, device: Device) -> list[str]:
    """What is wrong with this choice on such a device, as far as can be told without torch."""
    if device == "cpu" and loss == "liger":
        return [f"model.loss=liger: a kernel for CUDA, and device={device}; model.loss=auto takes what works"]
    return []
