"""A wish to end, while no rank runs that it could be passed on to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dtrain.runs.beside import SAME_PRESS_S, STOPS, caught, every
from dtrain.runs.outcomes import BY_SCHEDULER, STOP_FILE, STOPPED

if TYPE_CHECKING:
    from dtrain.runs import RunDir

LOOK_S = 1.0
AGAIN_S = 10.0
"""Python drops an exception that a signal raises within a finalizer or a callback of C: it is raised again."""


class Wish:
    """What has come so far, and what it is to end: at once in a block that says so, else as the next such block begins.
    A second one, which is no SIGUSR1, ends it wherever it is.
    """

    def __init__(self) -> None:
        self._run: RunDir | None = None
        self._code = STOPPED
        self._why: str | None = None
        self._came_at = 0.0
        self._heeding = self._from_file = self._insists = self._said = False
        self._deaf: Collection[int] = ()
        self._left: tuple[int, int] | None = None
        """The file STOP that was there already when this began."""

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum in self._deaf:
            return
        if self._why is None:
            from_file = self._from_file and signum == signal.SIGUSR1
            self._why, self._came_at = STOP_FILE if from_file else signal.Signals(signum).name, now
            if self._heeding or (self._run is None and signum == signal.SIGINT):
                self._end()
            if self._run is None:
                _say(f"{self._why}: it ends as soon as it has planned; again: at once")
        elif self._insists or (signum != signal.SIGUSR1 and now - self._came_at > SAME_PRESS_S):
            self._insists = False
            self._end()

    def known(self, run: RunDir, code: int) -> None:
        """Which run it is, and the exit code that has whatever started the command start it again. Raises SystemExit
        where it was to end meanwhile.
        """
        self._run, self._code, self._left = run, code, _stamp(run.stop_trigger)
        self.heed()

    def heed(self) -> None:
        """Raises SystemExit where it was to end, and KeyboardInterrupt where somebody sits there."""
        if self._why is not None:
            self._end()

    @contextmanager
    def heeding(self, *, but: Collection[signal.Signals] = ()) -> Iterator[None]:
        """What the block does may be left half done: it ends there. Else a wish waits until what was begun is whole, as
        the last word to other machines, a lock's file, or the verdict on a run that has ended. `but`: signals that mean
        nothing in it.
        """
        before, self._heeding, self._deaf = self._heeding, True, but
        try:
            self.heed()
            yield
            self.heed()
        finally:
            self._heeding, self._deaf = before, ()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The same, and the file STOP counts too, which a batch script makes before its time is over."""
        main = threading.get_ident()

        def look() -> bool:
            if self._why is None and self._is_asked(_stop(self._run)):
                self._from_file = True
                signal.pthread_kill(main, signal.SIGUSR1)  # also where the main thread sleeps
            elif self._why is not None and time.monotonic() - self._came_at > AGAIN_S:
                self._came_at, self._insists = time.monotonic(), True
                signal.pthread_kill(main, signal.SIGUSR1)
            return False

        with self.heeding():
            if self._is_asked(_stop(self._run)):
                self._end_by_file()
            with every(LOOK_S, look):
                yield

    def forget(self) -> None:
        """Remove a file STOP that was there before. Raises SystemExit where it is a new one: what is looked at is taken
        away first, so that none is removed unseen.
        """
        taken = _stop(self._run).with_name(f".STOP-{os.getpid()}")
        try:
            _stop(self._run).replace(taken)
        except FileNotFoundError:
            return
        asked = self._is_asked(taken)
        taken.unlink(missing_ok=True)
        if asked:
            self._end_by_file()

    def _is_asked(self, stop: Path) -> bool:
        """Whether this file STOP is there and new, or one that the script of this start has made."""
        from dtrain.verbs import _requeue

        there = _stamp(stop)
        return there is not None and (there != self._left or _requeue.is_of_this_start(stop))

    def _end_by_file(self) -> None:
        self._from_file, self._why, self._came_at = True, STOP_FILE, time.monotonic()
        self._end()

    def _end(self) -> None:
        from dtrain.verbs import _requeue

        assert self._why is not None
        if self._why == signal.SIGINT.name:
            raise KeyboardInterrupt
        again = self._run is not None and self._why in BY_SCHEDULER and _requeue.ask(self._run)
        if self._run is not None and self._from_file:
            self._run.stop_trigger.unlink(missing_ok=True)
        if not self._said:
            self._said = True
            _say(f"{self._why}: ended while no rank ran; the same command goes on from what is prepared and saved"
                 + ("; the batch script is asked to queue the job again" if again else ""))  # fmt: skip
        raise SystemExit(self._code)


@contextmanager
def heeded() -> Iterator[Wish]:
    """SIGINT, SIGTERM, SIGUSR1 and, but under nohup, SIGHUP end what heeds them, so that what it holds is given back
    and other machines are told. The first process of a container would else not be ended by them at all: the kernel
    keeps it from signals that it has no handler for.
    """
    wish = Wish()
    with caught(wish.on_signal):
        let_in()
        yield wish


def let_in() -> None:
    """Signals that were held back since the interpreter began."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _stop(run: RunDir | None) -> Path:
    assert run is not None
    return run.stop_trigger


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # a print may be what the signal has come into


def _stamp(stop: Path) -> tuple[int, int] | None:
    """Tells a file STOP from another one, or from one that was touched again; None where there is none."""
    try:
        there = stop.stat()
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns
