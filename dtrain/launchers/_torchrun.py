"""What torchrun says of the ranks it started: its log is the only place where a signal's victim is named."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path

_CLOSING = re.compile(r"Sending process (\d+) closing signal")
_TOLD_TO_STOP = re.compile(r"Received \w+ death signal|got signal:")
_FAILED = re.compile(r"rank\s+: (\d+) \(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)")
_FAILED_EARLY = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """How a rank's process ended."""

    rank: int
    local_rank: int
    code: int
    """Negative: the signal."""
    pid: int

    @property
    def signal_name(self) -> str | None:
        if self.code >= 0:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


def is_closing(log: Path) -> bool:
    """Whether torchrun has begun to end the other ranks because one failed."""
    text = _read(log)
    return _CLOSING.search(text) is not None and _TOLD_TO_STOP.search(text) is None


def first_exits(log: Path, first_rank: int = 0) -> list[Exit]:
    """The ranks that had ended badly before torchrun began to end the others; `first_rank`: the first one here."""
    text = _read(log)
    closed = {int(pid) for pid in _CLOSING.findall(text)}
    exits = [Exit(rank=int(rank), local_rank=int(local), code=int(code), pid=int(pid))
             for rank, local, code, pid in _FAILED.findall(text)]  # fmt: skip
    if not exits:
        exits = [Exit(rank=first_rank + int(local), local_rank=int(local), code=int(code), pid=int(pid))
                 for code, local, pid in _FAILED_EARLY.findall(text)]  # fmt: skip
    return [exit_ for exit_ in exits if exit_.pid not in closed]


def _read(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
