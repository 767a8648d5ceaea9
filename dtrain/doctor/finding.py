"""What a check comes to."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: Literal["ok", "warn", "fail"]
    """`warn`: a run may work, and something is worth knowing; `fail`: one will not."""
    text: str
    advice: str = ""
    """What to do."""

    def line(self) -> str:
        return f"{self.state:<5} {self.name:<12} {self.text}" + (f": {self.advice}" if self.advice else "")
