"""The scale of the loss in fp16, for strategies that have none of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

START_SCALE = 2.0**16
"""Of the loss in fp16, before anything is known of its gradients."""


class LossScale:
    """Dynamic scale of the loss for fp16: halved on overflow, doubled after a while without (arXiv 1710.03740).

    It changes at the very steps at which DeepSpeed's does: by the good steps that there were before the present one.
    """

    def __init__(self, *, enabled: bool, start: float = START_SCALE, grow_after: int = 1000) -> None:
        self.value = start if enabled else 1.0
        self._enabled, self._start = enabled, start
        self._grow_after = grow_after
        self._good = 0

    def counters(self) -> dict[str, float]:
        return {"loss_scale": self.value, "good_steps": self._good} if self._enabled else {}

    def restore(self, counters: Mapping[str, float]) -> None:
        """To those of a checkpoint; of one in another precision, to the beginning."""
        if self._enabled:
            self.value, self._good = counters.get("loss_scale", self._start), int(counters.get("good_steps", 0))

    def update(self, norm: float) -> bool:
        """Told the step's gradient norm; True where a scale that was too high explains that it is not finite."""
        if not self._enabled:
            return False
        if math.isfinite(norm):
            if self._good and self._good % self._grow_after == 0:
                self.value *= 2.0
            self._good += 1
            return False
        self._good = 0
        self.value /= 2.0
        return self.value >= 1.0
