"""Rows that are wrong: collected and told together, or left out and counted."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import ClassVar

from dtrain.config.spec import DatasetSpec, OnBadRow
from dtrain.datasets.base import Skipped
from dtrain.errors import DataError

_NUMBER = re.compile(r"(?<![\w-])\d+")


class BadRowError(DataError):
    """One row that cannot be used; others may. The message is `reason`, or `reason: detail`."""

    @property
    def reason(self) -> str:
        """By which such rows are counted: without the detail, and with numbers left open."""
        return _NUMBER.sub("N", str(self).partition(": ")[0])


class LeftOutError(Exception):
    """A row that is well but not learned from, by a rule of the objective; counted by this message."""


@dataclasses.dataclass
class BadRows:
    """The first few of each reason, and how many there are."""

    shown: ClassVar[int] = 5
    on_bad_row: OnBadRow = "error"
    max_fraction: float = 0.0
    num_good: int = 0
    first: list[str] = dataclasses.field(default_factory=list)
    """Each as `file:line: reason: detail`, over all reasons."""
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    """By reason."""
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The first of each reason, as `file:line`."""

    @classmethod
    def of(cls, dataset: DatasetSpec) -> BadRows:
        return cls(dataset.on_bad_row, dataset.max_bad_fraction)

    @property
    def fatal(self) -> bool:
        """Whether what follows is only looked through for further ones."""
        return self.on_bad_row == "error" and bool(self.counts)

    @property
    def num(self) -> int:
        return self.counts.total()

    def add(self, source: str, error: BadRowError) -> Skipped:
        """What stands for the row among the examples."""
        skipped = Skipped(source, error.reason, bad=True)
        self.count(skipped, f"{source}: {error}")
        return skipped

    def count(self, skipped: Skipped, text: str = "") -> None:
        """For rows that another reader found bad; it raises by itself where that is an error."""
        self.counts[skipped.reason] += 1
        places = self.places.setdefault(skipped.reason, [])
        if len(places) < self.shown:
            places.append(skipped.source)
        if len(self.first) < self.shown:
            self.first.append(text or f"{skipped.source}: {skipped.reason}")

    def check(self) -> None:
        """After the last row. Raises DataError where they are an error, or too many."""
        if not self.num:
            return
        more = [f"... and {self.num - len(self.first)} more"] if self.num > len(self.first) else []
        if self.on_bad_row == "error":
            title = f"dataset: {self.num} bad row{'s' if self.num > 1 else ''}; repair or remove, or set " \
                    f"dataset.on_bad_row=skip:"  # fmt: skip
            raise DataError("\n  ".join([title, *self.first, *more, *self._by_reason()]))
        read = self.num + self.num_good
        if self.num / read > self.max_fraction:
            title = f"dataset.max_bad_fraction={self.max_fraction}: {self.num:,} of {read:,} rows are bad, which is " \
                    f"{self.num / read:.1%}; repair them, or raise it:"  # fmt: skip
            raise DataError("\n  ".join([title, *self.first, *more, *self._by_reason()]))

    def _by_reason(self) -> list[str]:
        """Only where it says more than the rows themselves."""
        if self.num == len(self.first) or len(self.counts) == 1:
            return []
        return ["in all: " + ", ".join(f"{num:,} {reason}" for reason, num in self.counts.most_common())]
