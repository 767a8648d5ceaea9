"""A signal to end, while no rank runs that it could be passed on to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heeded(code: int) -> Iterator[None]:
    """SIGTERM ends the block with SystemExit(`code`), so that what it holds is given back and other machines are told.
    The first process of a container would else not be ended by it at all: the kernel keeps it from signals that it has
    no handler for.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, b"SIGTERM: ended while no rank ran; the same command goes on from the newest checkpoint\n")
        raise SystemExit(code)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
