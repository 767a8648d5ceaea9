from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dtrain.config.spec import ScheduleSpec, spec
from dtrain.schedules.base import warmup


@spec
class Constant(ScheduleSpec):
    warmup_steps: Annotated[int, Field(ge=0)] = 0

    def factor(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_steps)
