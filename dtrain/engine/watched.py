"""A rank that can be watched from outside: it says where it is, and shows its stacks when it is asked to."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from pathlib import Path
from typing import TextIO, final

from dtrain.engine.state import Progress
from dtrain.runs.hang import FLIGHT, FLIGHT_PIPE, SHOW_STACKS, stacks_path
from dtrain.runs.pulse import FOLDER, Pulse


@final
class Watched:
    """Of this process, for as long as it is a rank."""

    def __init__(self, rank: int, progress: Progress) -> None:
        folder = os.environ.get(FOLDER)
        self._pulse: Pulse | None = None
        self._stacks: TextIO | None = None
        if folder is None:
            return
        self._pulse = Pulse(Path(folder), rank)
        progress.pulse = self._pulse
        with contextlib.suppress(OSError):
            self._stacks = stacks_path(Path(folder), rank).open("w")
            # The handler is in C: it also runs where the interpreter is stuck in a call that never returns.
            faulthandler.register(SHOW_STACKS, file=self._stacks, all_threads=True)
        # torch's recorder of the last collectives writes what it has once something is written to its pipe.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", f"{folder}/{FLIGHT_PIPE}")
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, f"{folder}/{FLIGHT}")

    def end(self) -> None:
        """It is watched no more."""
        if self._pulse is not None:
            self._pulse.end()
