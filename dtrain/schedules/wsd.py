from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dtrain.config.spec import ScheduleSpec, spec
from dtrain.schedules.base import warmup


@spec
class WSD(ScheduleSpec):
    """Warm-up, stable, decay (arXiv 2404.06395)."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of all steps that the last, straight decay takes."""
    min_factor: Annotated[float, Field(ge=0, le=1)] = 0.0

    def factor(self, step: int, steps: int) -> float:
        decay_steps = round(steps * self.decay_fraction)
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return warmup(step, self.warmup_steps) * (self.min_factor + (1.0 - self.min_factor) * left)
