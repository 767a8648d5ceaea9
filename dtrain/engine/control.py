"""What asks a run to save or to stop: signals, a file, the clock. It takes note; the loop acts, on all ranks alike."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import final

from dtrain.runs import outcomes

LOOK_S = 1.0
"""How often the trigger files are looked for."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT = 1000
STOP_FILE = 1001
JOINED = 1002
"""Beyond the numbers of signals."""
SPARE_S = 20.0
"""For what comes after the last save: trackers that finish, pictures, processes that end."""
_WORDS = {TIME_LIMIT: outcomes.TIME_LIMIT, STOP_FILE: outcomes.STOP_FILE, JOINED: outcomes.JOINED}


@final
class Control:
    """Of one rank. Any rank may be signalled; the file and the clock are rank 0's to look at."""

    def __init__(self, *, trigger: Path | None = None, stop_trigger: Path | None = None, joined: Path | None = None,
                 every_minutes: float | None = None, time_left_s: float | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """`trigger`, `stop_trigger`, `joined`: files that ask for a save, or a stop and say why, and are removed. Give
        them, and the times, on rank 0 alone.
        """
        self._clock, self._trigger = clock, trigger
        self._stop_triggers = {STOP_FILE: stop_trigger, JOINED: joined}
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._deadline = None if time_left_s is None else clock() + time_left_s
        self._signal = 0
        self._looked_at = self._looked_for_stop_at = self._saved_at = clock()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum

    def stop(self, *, step_s: float, save_s: float) -> int:
        """Why to stop now: a signal's number, TIME_LIMIT, STOP_FILE, JOINED, or 0. `step_s`, `save_s`: of each one."""
        if self._signal:
            return int(self._signal)
        now = self._clock()
        if now - self._looked_for_stop_at >= LOOK_S:
            self._looked_for_stop_at = now
            for code, trigger in self._stop_triggers.items():
                if _take(trigger):
                    self._signal = code
                    return code
        if self._deadline is not None and self._deadline - now < 2 * (step_s + save_s) + SPARE_S:
            return TIME_LIMIT
        return 0

    def save(self) -> bool:
        """Whether a save is due by the clock or was asked for; tells it once."""
        now = self._clock()
        due = self._every_s is not None and now - self._saved_at >= self._every_s
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            due = _take(self._trigger) or due
        if due:
            self._saved_at = now
        return due

    def saved(self) -> None:
        """A save has begun, for whatever reason."""
        self._saved_at = self._clock()


def _take(trigger: Path | None) -> bool:
    """Whether the file is there; then it is removed."""
    if trigger is None or not trigger.exists():
        return False
    trigger.unlink(missing_ok=True)
    return True


def why(code: int) -> str:
    """The reason that `Control.stop` gave, in words."""
    return _WORDS[code] if code in _WORDS else signal.Signals(code).name
