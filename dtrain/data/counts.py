"""What became of the examples: nothing that is left out, cut or split goes uncounted."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

READ = "read"
HELD_OUT = "held out for eval"
"""Of a stream, which leaves these out as it comes to them."""
CUT_OFF, CUT_OFF_LEARNED = "tokens cut off", "of these to be learned"
PLACEHOLDER = "with {{%s}}"
"""A name in double braces, as of a template that nobody has filled in."""

_SOURCES = 8
"""Up to which all are told of; of more those that lost something, where the places do not name all of it."""
_WITHOUT_PLACE = (READ, HELD_OUT, CUT_OFF, CUT_OFF_LEARNED)
_PLACEHOLDERS = PLACEHOLDER.partition("%")[0]


@dataclasses.dataclass(slots=True)
class Counts:
    """By reason, in the words that a user reads."""

    kept_sources: ClassVar[int] = 1000
    kept_places: ClassVar[int] = 5
    kept_placeholders: ClassVar[int] = 8
    others: ClassVar[str] = "(others)"

    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    sources: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """The same of each file, or whatever else the examples say that they come from; those after the first thousand
    count as one."""
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Where the first of each reason are, as `file:line`; not of those that are simply read
    or held out."""

    def add(self, reason: str, source: str, num: int = 1) -> None:
        """`source` is an example's: `file:line`, `file:row N` or `file:byte N`."""
        reason = self._kept(reason)
        name, _, place = source.rpartition(":")
        numbered = place.removeprefix("row ").removeprefix("byte ").isdigit()
        self._count(reason, name if numbered else source, num)
        places = self.places.setdefault(reason, []) if reason not in _WITHOUT_PLACE else None
        if places is not None and len(places) < self.kept_places and source not in places:
            places.append(source)

    def update(self, later: Counts) -> None:
        """Add what was counted after this."""
        for source, reasons in later.sources.items():
            for reason, num in reasons.items():
                self._count(self._kept(reason), source, num)
        for reason, found in later.places.items():
            places = self.places.setdefault(self._kept(reason), [])
            places += found[: self.kept_places - len(places)]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For the screen."""
        found = [f"documents: {_listed(self.reasons)}"]
        if 1 < len(self.sources) <= _SOURCES:
            found += [f"  {source}: {_listed(reasons)}" for source, reasons in self.sources.items()]
        elif len(self.sources) > _SOURCES:
            lost = {source: num for source, reasons in self.sources.items() if (num := _lost(reasons))}
            shown = sorted(lost, key=lambda source: -lost[source])[:_SOURCES]
            unnamed = any(num > len(self.places.get(reason, ())) for reason, num in self.reasons.items()
                          if _lost({reason: num}))  # fmt: skip
            found += [f"  {source}: {_listed(self.sources[source])}" for source in shown if unnamed]
        for reason, places in self.places.items():
            if self.reasons[reason] > len(places):
                found.append(f"  {reason}: first at {', '.join(places[:3])}")
            else:
                found.append(f"  {reason}: at {', '.join(places)}")
        if any(reason.startswith(_PLACEHOLDERS) for reason in self.reasons):
            found.append("  names in double braces are taken as they stand: fill them in where that is not meant")
        return found

    def _kept(self, reason: str) -> str:
        """The reason that it is counted as: of placeholders only so many by name."""
        if reason in self.reasons or not reason.startswith(_PLACEHOLDERS):
            return reason
        num = sum(one.startswith(_PLACEHOLDERS) for one in self.reasons)
        return reason if num < self.kept_placeholders else PLACEHOLDER % "..."

    def _count(self, reason: str, source: str, num: int) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + num
        if source not in self.sources and len(self.sources) >= self.kept_sources:
            source = self.others
        reasons = self.sources.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + num


def _lost(reasons: dict[str, int]) -> int:
    """How many were left out or cut off, rather than only read, held out, split or looked at."""
    kept = (*_WITHOUT_PLACE, _PLACEHOLDERS, "split")
    return sum(num for reason, num in reasons.items() if not reason.startswith(kept))


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{num:,} {reason}" for reason, num in reasons.items())
