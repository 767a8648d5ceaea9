"""The place that a rank says it is at, in a small file on the machine's own disk, for the launcher that watches it.

Only what the main thread says counts: a thread of its own would go on beating while the training stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "DTRAIN_PULSE"
"""In the environment of every rank: where its launcher looks. Not set where nobody does."""
_NAME = "rank-"
_BYTES = 640
"""Of a word, always: more than its numbers take, each of 20 digits, so that one writes over all of the one before."""
_MOST_ROWS = 24


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    rank: int
    pid: int
    count: int
    """Grows with each word: as long as it is the same, the rank has not got on."""
    phase: str
    step: int
    """Optimizer steps done."""
    rows: tuple[int, ...] = ()
    """Of the prepared data, in the micro-batch that it computes; the first of them where they are many."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Place:
        return cls(**{**fields, "rows": tuple(fields["rows"])})


class Pulse:
    """Of this rank: call it wherever the rank gets on. It costs microseconds, and a disk that fails is no failure."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank, self._pid, self._count = rank, os.getpid(), 0
        self._path = folder / f"{_NAME}{rank}.json"
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, phase: str, step: int, rows: Sequence[int]) -> None:
        if self._file is None:
            return
        self._count += 1
        said = {"rank": self._rank, "pid": self._pid, "count": self._count, "phase": phase, "step": step,
                "rows": [int(row) for row in rows[:_MOST_ROWS]]}  # fmt: skip
        text = json.dumps(said).encode().ljust(_BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text, 0)

    def end(self) -> None:
        """Take the file away: a rank that has ended is not watched."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                self._path.unlink()


def read(folder: Path) -> list[Place] | None:
    """Where the ranks that live are, by rank; None while one of them is writing its word."""
    found = []
    for path in folder.glob(f"{_NAME}*.json"):
        try:
            found.append(Place.from_dict(json.loads(path.read_bytes())))
        except FileNotFoundError:  # it has just ended
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return sorted(found, key=lambda place: place.rank)
