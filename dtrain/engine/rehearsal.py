"""What is different in a rehearsal: the longest rows come first, and after some steps a rank is told to stop."""

from __future__ import annotations

import os
import signal
from typing import final

from dtrain.data.longest import LongestFirst
from dtrain.data.store import AbstractStore
from dtrain.data.streaming import Streams
from dtrain.runs.process import REHEARSAL
from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport


def steps() -> int | None:
    """Of each attempt; None where this is no rehearsal."""
    said = os.environ.get(REHEARSAL)
    return None if said is None else int(said)


def worst(rows: tuple[AbstractStore | Streams, AbstractStore]) -> tuple[AbstractStore | Streams, AbstractStore]:
    """To train and to evaluate on, the longest first; of a stream nobody knows which those are."""
    if steps() is None:
        return rows
    train, held_out = rows
    return (train if isinstance(train, Streams) else LongestFirst(train)), LongestFirst(held_out)


def stops(rank: int, size: int) -> list[AbstractTracker]:
    """What tells the last rank to stop, as a scheduler might."""
    num = steps()
    return [_Stop(num)] if num is not None and rank == size - 1 else []


@final
class _Stop(AbstractTracker):
    def __init__(self, after: int) -> None:
        self._left = after

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None: ...

    def step(self, report: StepReport) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def eval(self, report: EvalReport) -> None: ...

    def note(self, line: str) -> None: ...

    def finish(self, *, outcome: str) -> None: ...
