"""What goes on beside a block: signals are taken, or something is done again and again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_PRESS_S = 0.4
"""Two signals within this are one: a terminal and a wrapper may both pass on a single Ctrl-C."""


@contextmanager
def caught(
    handler: Callable[[int, FrameType | None], None], signals: Sequence[signal.Signals] = STOPS
) -> Iterator[None]:
    """The signals are for `handler`, but for SIGHUP under nohup. To be called in the main thread."""
    before: dict[signal.Signals, Any] = {}
    try:
        for signum in signals:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # under nohup
            before[signum] = signal.getsignal(signum)
            signal.signal(signum, handler)
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def every(seconds: float, do: Callable[[], bool]) -> Iterator[None]:
    """Call `do` from a thread, with so much time before each call, until it says True or the block ends."""
    done = threading.Event()

    def go_on() -> None:
        while not done.wait(seconds):
            if do():
                return

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
