"""What a rank writes when it fails, and which of several failures came first."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.runs.files import read_json, write_json
from dtrain.runs.hints import OUT_OF_MEMORY
from dtrain.runs.host import host_name
from dtrain.runs.secrets import scrub

if TYPE_CHECKING:
    from pathlib import Path

    from dtrain.runs.folder import RunDir

_SECONDARY = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|connection refused|socket (closed|timeout|error)"
    r"|connection was (closed|likely closed)|remote process (exited|has)|ncclRemoteError|communicator was aborted"
    r"|timed out waiting \d+ ?ms|wait timeout after \d+|watchdog caught collective|failed to recv|recvValue failed"
    r"|sendBytes failed|process group .* (aborted|terminated)|application timeout caused pair closure"
    r"|gloo.*(peer|EOF)|store.*(closed|unreachable)",
    re.IGNORECASE,
)
"""How the others notice that a rank has gone."""
_SECONDARY_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "BrokenPipeError", "ConnectionResetError"}
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """One rank's end, as it saw it; for a rank that was killed, as the launcher saw it."""

    rank: int
    host: str
    local_rank: int
    phase: str
    """What the rank was doing: init, load, begin, data, train, eval, save, write, export, end; empty where nobody
    knows."""
    step: int | None
    kind: str
    """user, worker, hang, nonfinite, leap, oom or storage."""
    type: str
    """The exception's class, or the signal's name."""
    message: str
    traceback: str
    time_ns: int
    log: str
    """Of the rank, relative to the run folder."""
    rows: tuple[int, ...] = ()
    """Of the prepared data, in the micro-batch that the rank computed."""

    @property
    def secondary(self) -> bool:
        """Whether this is how a rank noticed that another had gone, as far as the words tell."""
        if self.kind != "worker":
            return False
        return self.type in _SECONDARY_TYPES or _SECONDARY.search(self.message) is not None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Failure:
        names = [field.name for field in dataclasses.fields(cls)]
        known: dict[str, Any] = {name: fields.get(name, _ABSENT.get(name)) for name in names}
        return cls(**{**known, "rows": tuple(known["rows"] or ())})


_ABSENT: dict[str, Any] = {"rank": -1, "local_rank": -1, "host": "", "phase": "", "kind": "worker", "type": "",
                           "message": "", "traceback": "", "time_ns": 0, "log": ""}  # fmt: skip


def kind_of(exc: BaseException) -> str:
    """The `kind` of our own errors; storage for a disk that is full or gone; oom where memory ran out; else worker."""
    if isinstance(exc, OSError) and exc.errno in _STORAGE:
        return "storage"
    if OUT_OF_MEMORY.search(f"{type(exc).__name__}: {exc}"):
        return "oom"
    kind = getattr(exc, "kind", "worker")
    return kind if isinstance(kind, str) else "worker"


def failure_path(run: RunDir, attempt: int, rank: int) -> Path:
    return run.attempt_dir(attempt) / f"rank-{rank}.failure.json"


_spare: list[int] = []


def spare_a_file() -> None:
    """See to it that this process can `record_failure` when it has opened all the files that it may."""
    _spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def record_failure(run: RunDir, attempt: int, rank: int, exc: BaseException, *, phase: str, step: int | None = None,
                   rows: Sequence[int] = ()) -> Failure:  # fmt: skip
    """Write what ended this rank where the launcher looks. The first one written stays."""
    failure = Failure(
        rank=rank,
        host=host_name(),
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        phase=phase,
        step=step,
        kind=kind_of(exc),
        type=type(exc).__name__,
        message=scrub(str(exc)),
        traceback=scrub("".join(traceback.format_exception(exc))),
        time_ns=time.time_ns(),
        log=run.log(attempt, rank).relative_to(run.path).as_posix(),
        rows=tuple(int(row) for row in rows),
    )
    path = failure_path(run, attempt, rank)
    while _spare:
        os.close(_spare.pop())
    if not path.exists():
        write_json(path, dataclasses.asdict(failure))
    return failure


def read_failures(run: RunDir, attempt: int) -> list[Failure]:
    """Those that ranks have written so far, by time."""
    paths = run.attempt_dir(attempt).glob("rank-*.failure.json")
    read = (read_json(path) for path in sorted(paths))
    return sorted((Failure.from_dict(fields) for fields in read if fields), key=lambda failure: failure.time_ns)


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """The one to show: the earliest that is not the echo of another rank's end, else the earliest."""
    ordered = sorted(failures, key=lambda failure: (failure.secondary, failure.time_ns))
    return ordered[0] if ordered else None
