"""A step in which a rank ran out of memory: all ranks save the state that it began with, and end.

The others stand in a collective that the failed rank will not come to, and cannot be called out of it. So a thread of
each looks for its word. None can have begun the update, which needs the losses of all.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, final

from dtrain.runs.failures import kind_of
from dtrain.runs.files import read_json, write_json

LOOK_S = 0.5
COME_S = 120.0
"""What a rank gets to come to the step that another failed in: it may be saving, or tell its trackers."""
RECORDED_S = 10.0
"""What the failed rank gets to say so, once all have saved."""


class AbstractRescue(Protocol):
    def begin(self, step: int, keep: Callable[[], None]) -> None:
        """A step begins; `keep` saves the state that it begins with. Collective, but not over the training's groups."""

    def updating(self) -> None:
        """From now on the state is no more the one that the step began with."""

    def failed(self, error: BaseException) -> None:
        """The step cannot be ended by this rank. Returns once there is saved what could be."""

    def end(self) -> None: ...


@final
class NoRescue:
    """Where the run ends instead."""

    def begin(self, step: int, keep: Callable[[], None]) -> None: ...

    def updating(self) -> None: ...

    def failed(self, error: BaseException) -> None: ...

    def end(self) -> None: ...


NO_RESCUE = NoRescue()


@final
class Rescue:
    """Of one rank."""

    def __init__(self, word: Path, recorded: Callable[[], bool], leave: Callable[[], None]) -> None:
        """`word`: the file by which a rank that failed tells the others. `recorded`: whether it has said how it ended.
        `leave`: ends this process.
        """
        self._word, self._recorded, self._leave = word, recorded, leave
        self._step: int | None = None
        self._keep: Callable[[], None] = lambda: None
        self._once, self._kept, self._over = threading.Lock(), False, threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="rescue").start()

    def begin(self, step: int, keep: Callable[[], None]) -> None:
        self._keep, self._step = keep, step

    def updating(self) -> None:
        self._step = None

    def failed(self, error: BaseException) -> None:
        if self._step is None:
            return
        if kind_of(error) == "oom":
            write_json(self._word, {"step": self._step})
        elif not self._word.exists():
            return
        self._keep_once()
        self._over.set()

    def end(self) -> None:
        self._over.set()

    def _keep_once(self) -> None:
        with self._once:
            if not self._kept:
                self._kept = True
                try:
                    self._keep()
                except Exception:  # noqa: BLE001  what ended the step is the failure to tell
                    traceback.print_exc()

    def _listen(self) -> None:
        while not self._over.wait(LOOK_S):
            if (said := read_json(self._word)) is not None:
                break
        else:
            return
        deadline = time.monotonic() + COME_S
        while self._step != said["step"]:
            if time.monotonic() > deadline or self._over.wait(LOOK_S / 5):
                return
        self._keep_once()
        deadline = time.monotonic() + RECORDED_S
        while time.monotonic() < deadline and not self._recorded():
            if self._over.wait(LOOK_S / 5):
                return
        self._leave()
