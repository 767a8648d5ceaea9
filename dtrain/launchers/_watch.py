"""Whether the ranks of this machine get on: each says where it is, and there is a limit to how long it may stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from dtrain.runs.pulse import Place, read

HangAfter = float | Literal["auto", "off"]

LEAST_S = 300.0
"""Of a limit that was learned. Below torch's 600 s for a collective, which does not say who did not come."""
FACTOR = 10.0
"""So many times the longest stay that there was in a phase, but no more than UNKNOWN_S above it."""
UNKNOWN_S = 1800.0
"""For a phase that no rank has got through yet: a first step may compile, a first save meet a slow disk."""
RARE_S = 3600.0
RARE = ("init", "load", "write", "export", "end")
"""Phases whose length depends on the size of files rather than on what was seen before."""
NAP_S = 5.0
"""A look that comes so much later than the last one was held up itself, by a job that was suspended: not the ranks'."""


class Watch:
    """Of one attempt, on one machine."""

    def __init__(self, folder: Path, hang_after: HangAfter, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._hang_after, self._clock = folder, hang_after, clock
        self._looked_at, self._awake_s = clock(), 0.0
        self._last: dict[int, Place] = {}
        self._since: dict[int, float] = {}
        self._longest: dict[str, float] = {}

    def look(self) -> Mapping[int, float]:
        """The ranks, each with the seconds that it has not got on, where this is a hang: when every rank here is past
        its limit. One that waits for another is late first, and is not to blame.
        """
        if self._hang_after == "off":
            return {}
        now = self._clock()
        self._awake_s += min(now - self._looked_at, NAP_S)
        self._looked_at = now
        said = read(self._folder)
        if said is None:  # at the next look
            return {}
        places = {place.rank: place for place in said}
        for rank, place in places.items():
            before = self._last.get(rank)
            if before is None or (before.pid, before.count) != (place.pid, place.count):
                if before is not None and before.pid == place.pid:
                    stayed = self._awake_s - self._since[rank]
                    self._longest[before.phase] = max(stayed, self._longest.get(before.phase, 0.0))
                self._last[rank], self._since[rank] = place, self._awake_s
        stale = {rank: self._awake_s - self._since[rank] for rank in places}
        late = all(seconds > self.limit(places[rank].phase) for rank, seconds in stale.items())
        return stale if stale and late else {}

    def limit(self, phase: str) -> float:
        """How long a rank may stay in one place of this phase."""
        if isinstance(self._hang_after, float):
            return max(self._hang_after, RARE_S) if phase in RARE else self._hang_after
        longest = self._longest.get(phase)
        least = RARE_S if phase in RARE else UNKNOWN_S if longest is None else LEAST_S
        return max(least, min(FACTOR * (longest or 0.0), UNKNOWN_S + (longest or 0.0)))

    def places(self) -> list[Place]:
        """Where the ranks of this machine are, or were when they were ended."""
        for _ in range(10):
            if (said := read(self._folder)) is not None:
                return said
            time.sleep(0.01)
        return list(self._last.values())
