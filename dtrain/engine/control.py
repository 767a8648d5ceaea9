"""What asks a run to save or to stop: signals, a file, the clock. It takes note; the loop acts, on all ranks alike."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import final

LOOK_S = 1.0
"""How often the trigger file is looked for."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT = 1000
"""Beyond the numbers of signals."""
SPARE_S = 5.0


@final
class Control:
    """Of one rank. Any rank may be signalled; the file and the clock are rank 0's to look at."""

    def __init__(self, *, trigger: Path | None = None, every_minutes: float | None = None,
                 time_left_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """`trigger`: a file that asks for a save, and is removed. Give it, and the times, on rank 0 alone."""
        self._clock, self._trigger = clock, trigger
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._deadline = None if time_left_s is None else clock() + time_left_s
        self._signal = 0
        self._looked_at = self._saved_at = clock()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum

    def stop(self, *, step_s: float, save_s: float) -> int:
        """Why to stop now: a signal's number, TIME_LIMIT, or 0. `step_s`, `save_s`: what a step and a save take."""
        if self._signal:
            return int(self._signal)
        if self._deadline is not None and self._deadline - self._clock() < 2 * (step_s + save_s) + SPARE_S:
            return TIME_LIMIT
        return 0

    def save(self) -> bool:
        """Whether a save is due by the clock or was asked for; tells it once."""
        now = self._clock()
        due = self._every_s is not None and now - self._saved_at >= self._every_s
        if self._trigger is not None and now - self._looked_at >= LOOK_S:
            self._looked_at = now
            if self._trigger.exists():
                self._trigger.unlink(missing_ok=True)
                due = True
        if due:
            self._saved_at = now
        return due

    def saved(self) -> None:
        """A save has begun, for whatever reason."""
        self._saved_at = self._clock()


def why(code: int) -> str:
    """The reason that `Control.stop` gave, in words."""
    return "the time limit is near" if code == TIME_LIMIT else signal.Signals(code).name
