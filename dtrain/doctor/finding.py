"""What a check comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

State = Literal["ok", "warn", "fail"]
"""`warn`: a run may work, and something is worth knowing; `fail`: one will not."""
STATES: tuple[State, ...] = get_args(State)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    text: str
    advice: str = ""
    """What to do."""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What was measured, where more is better, to be compared with other machines."""

    def line(self) -> str:
        return f"{self.state:<5} {self.name:<12} {self.text}" + (f": {self.advice}" if self.advice else "")
