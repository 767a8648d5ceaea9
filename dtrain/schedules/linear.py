from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dtrain.config.spec import ScheduleSpec, spec
from dtrain.schedules.base import progress, warmup


@spec
class Linear(ScheduleSpec):
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the line ends, as a share of `optim.lr`."""

    def factor(self, step: int, steps: int) -> float:
        left = 1.0 - progress(step, steps, self.warmup_steps)
        return warmup(step, self.warmup_steps) * (self.min_factor + (1.0 - self.min_factor) * left)
