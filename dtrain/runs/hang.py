"""What the ranks leave that did not get on: where each was, and its stacks."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.runs.files import read_json
from dtrain.runs.pulse import Place

if TYPE_CHECKING:
    from dtrain.runs.folder import RunDir

SHOW_STACKS = signal.SIGUSR2
"""Asks a rank to write its stacks to `stacks_path`."""
FLIGHT, FLIGHT_PIPE = "nccl-", "nccl-pipe-"
"""Beginnings of names in the watched folder; torch adds the rank, and `.pipe` to the second."""
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\n((?:  .*\n?)*)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_WAITS = ("torch/distributed/", "deepspeed/comm/", "dtrain/comm.py", "dtrain/engine/step.py", "torch/autograd/graph.py")
"""Where a rank is that waits for others: in a collective, in a backward pass whose hooks make them, or for a device
that makes one."""
_SHOWN = 2


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


@dataclasses.dataclass(frozen=True, slots=True)
class Stuck:
    """A rank when the run had not got on for too long."""

    place: Place
    host: str
    stale_s: float
    """How long it had been there."""
    stopped: bool
    """Its process was halted, as by SIGSTOP."""
    where: tuple[str, ...] = ()
    """Its main thread's innermost frames, as `file:line function`."""
    stacks: str = ""
    """The file with all of them, relative to the run folder."""

    @property
    def waits(self) -> bool:
        """Whether it waited for other ranks, as far as its stack tells."""
        return bool(self.where) and any(part in self.where[0] for part in _WAITS)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Stuck:
        return cls(**{**fields, "place": Place.from_dict(fields["place"]), "where": tuple(fields["where"])})

    def line(self) -> str:
        """In words."""
        at = f"rank {self.place.rank} on {self.host}: {self.place.phase} at step {self.place.step}"
        if self.stopped:
            return f"{at}, halted (SIGSTOP)"
        inside = " < ".join(_short(frame) for frame in self.where[:_SHOWN])
        return f"{at}, in {inside}" if inside else f"{at}, which shows no stack"


def main_thread(stacks: str) -> tuple[str, ...]:
    """The frames of the main thread in what faulthandler writes, innermost first; it lists the oldest thread last."""
    threads = _THREAD.findall(stacks)
    return tuple(f"{file}:{line} {name}" for file, line, name in _FRAME.findall(threads[-1])) if threads else ()


def _short(frame: str) -> str:
    path, _, rest = frame.rpartition(":")
    return "/".join(Path(path).parts[-2:]) + f":{rest}"


def read_hang(run: RunDir, attempt: int) -> list[Stuck]:
    """The ranks of all machines that were recorded, by rank; none where the attempt did not hang."""
    found: list[Stuck] = []
    for path in sorted(run.hang_dir(attempt).glob("node-*.json")):
        found += [Stuck.from_dict(one) for one in (read_json(path) or {}).get("ranks", [])]
    return sorted(found, key=lambda one: one.place.rank)


def differing(ranks: Sequence[Stuck]) -> list[Stuck]:
    """Those that the others wait for, as far as one can tell; none where all are alike.

    By what says most: a process that is halted; one that stood still while others got on, as those do that have noticed
    that ranks of another machine were ended; a stack that is in no collective while others are; fewer steps; a place
    where few are.
    """
    halted = [one for one in ranks if one.stopped]
    if halted:
        return halted
    longest = max((one.stale_s for one in ranks), default=0.0)
    still = [one for one in ranks if one.stale_s >= longest / 2]
    if len(still) < len(ranks):
        return differing(still) or still
    busy = [one for one in ranks if not one.waits]
    if busy and len(busy) < len(ranks):
        return busy
    behind = min((one.place.step for one in ranks), default=0)
    late = [one for one in ranks if one.place.step == behind]
    if len(late) < len(ranks):
        return late
    groups = Counter((one.place.phase, _functions(one)) for one in ranks)
    fewest = min(groups.values(), default=0)
    few = [one for one in ranks if groups[one.place.phase, _functions(one)] == fewest]
    return few if len(few) < len(ranks) / 2 else []


def _functions(one: Stuck) -> tuple[str, ...]:
    return tuple(frame.rpartition(" ")[2] for frame in one.where)
