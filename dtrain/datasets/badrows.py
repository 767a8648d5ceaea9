"""Rows that are wrong, collected and told together."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dtrain.errors import DataError


@dataclasses.dataclass
class BadRows:
    """The first few, and how many there are."""

    shown: ClassVar[int] = 5
    first: list[str] = dataclasses.field(default_factory=list)
    """Each as `file:line: reason`."""
    num: int = 0

    def add(self, problem: str) -> None:
        self.num += 1
        if len(self.first) < self.shown:
            self.first.append(problem)

    def raise_if_any(self) -> None:
        """Raises DataError."""
        if not self.num:
            return
        more = [f"... and {self.num - len(self.first)} more"] if self.num > len(self.first) else []
        title = f"dataset: {self.num} bad row{'s' if self.num > 1 else ''}; repair or remove:"
        raise DataError("\n  ".join([title, *self.first, *more]))
