"""A wish to end, while no rank runs that it could be passed on to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

from dtrain.runs.beside import caught, every
from dtrain.runs.outcomes import BY_SCHEDULER, STOP_FILE

if TYPE_CHECKING:
    from dtrain.runs import RunDir

STOPPED: Final = 75
LOOK_S = 1.0


class Wish:
    """What has come so far, and what it is to end: once that is known, at once."""

    def __init__(self) -> None:
        self._run: RunDir | None = None
        self._code = STOPPED
        self._why: str | None = None
        self._from_file = False
        self._left: tuple[int, int] | None = None
        """The file STOP that was there already when this began."""

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        why = STOP_FILE if self._from_file else signal.Signals(signum).name
        if self._why is None and self._run is None:
            self._why = why
            _say(f"{why}: it ends as soon as it has planned; again: at once")
            return
        if self._why is not None and self._run is not None and signum == signal.SIGUSR1:
            return  # it is ending; a scheduler may say so several times
        self._why = self._why or why
        self._end(self._why)

    def known(self, run: RunDir, code: int) -> None:
        """Which run it is, and the exit code that has whatever started the command start it again. Raises SystemExit
        where it was to end meanwhile.
        """
        self._run, self._code, self._left = run, code, _stamp(run)
        if self._why is not None:
            self._end(self._why)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The file STOP counts too, which a batch script makes before its time is over."""
        main = threading.get_ident()

        def look() -> bool:
            if self._is_asked():
                self._from_file = True
                signal.pthread_kill(main, signal.SIGUSR1)  # also where the main thread sleeps
            return self._from_file

        if self._is_asked():
            self._from_file = True
            self._end(STOP_FILE)
        with every(LOOK_S, look):
            yield

    def _is_asked(self) -> bool:
        """Whether there is a file STOP that is new, or that the script of this start has made."""
        from dtrain.verbs import _requeue

        assert self._run is not None
        there = _stamp(self._run)
        return there is not None and (there != self._left or _requeue.is_of_this_start(self._run.stop_trigger))

    def _end(self, why: str) -> None:
        from dtrain.verbs import _requeue

        again = self._run is not None and why in BY_SCHEDULER and _requeue.ask(self._run)
        if self._run is not None and self._from_file:
            self._run.stop_trigger.unlink(missing_ok=True)
        _say(f"{why}: ended while no rank ran; the same command goes on from what is prepared and saved"
             + ("; the batch script is asked to queue the job again" if again else ""))  # fmt: skip
        raise SystemExit(self._code)


@contextmanager
def heeded() -> Iterator[Wish]:
    """SIGTERM, SIGUSR1 and, but under nohup, SIGHUP end the block with SystemExit, so that what it holds is given back
    and other machines are told. The first process of a container would else not be ended by them at all: the kernel
    keeps it from signals that it has no handler for.
    """
    wish = Wish()
    with caught(wish.on_signal, (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)):
        yield wish


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # a print may be what the signal has come into


def _stamp(run: RunDir) -> tuple[int, int] | None:
    """Tells a file STOP from another one, or from one that was touched again; None where there is none."""
    try:
        there = run.stop_trigger.stat()
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns
