"""One writer for a run folder."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.errors import RunError
from dtrain.runs.beside import every
from dtrain.runs.host import pids

NAME = ".lock"
BEAT_S = 15.0
"""How often the holder touches the lock; that is all another host can see of it."""
SILENT_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run folder."""

    pid: int
    host: str
    started: float
    """When the process started, by the host's own clock: tells a process from a later one with its pid."""
    since: str
    pids: str = ""
    """Where that pid means this process: hosts may share a name, as containers and copies of a machine do."""

    @classmethod
    def me(cls) -> Holder:
        return cls(pid=os.getpid(), host=socket.gethostname(), started=_start_of(os.getpid()) or 0.0,
                   since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), pids=pids())  # fmt: skip

    @property
    def is_here(self) -> bool:
        """Whether its pid means here what it means there."""
        return self.host == socket.gethostname() and self.pids in ("", pids())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _start_of(pid: int) -> float | None:
    """Start time of a live process of this host, in seconds since boot where the host tells; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        import psutil

        with suppress(psutil.Error):
            return float(psutil.Process(pid).create_time())
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else float(fields[18]) / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> Holder | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**fields)
    except (OSError, ValueError, TypeError):
        return None


def _alive(holder: Holder, path: Path) -> bool:
    if holder.is_here:
        return _start_of(holder.pid) == holder.started
    with suppress(OSError):
        return _now(path.parent) - path.stat().st_mtime < SILENT_S
    return False


def _now(folder: Path) -> float:
    """By the clock that stamps the files there: this host's own may have jumped, or differ from the holder's."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()


def live_holder(path: Path) -> Holder | None:
    """Who holds the lock at `path` now, as far as this host can tell."""
    holder = _read(path)
    return holder if holder is not None and _alive(holder, path) else None


def _refusal(run_dir: Path, holder: Holder | None) -> RunError:
    return RunError(f"{run_dir}: in use by {holder or 'another process'}; two runs cannot write one folder: stop that "
                    f"one, or give this one its own `run.name`")  # fmt: skip


@contextmanager
def hold(run_dir: Path, note: Callable[[str], None]) -> Iterator[Holder]:
    """Be the only holder of the folder. Raises RunError when another is alive; the lock of a dead one is taken over.

    The kernel's lock decides, since it ends with its holder; what the file says is for people, for other hosts, and
    for file systems without such locks.
    """
    path = run_dir / NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); whoever started a run goes on with it: give "
                       f"this one its own `run.name`, or set `run.dir` to a folder of yours") from None  # fmt: skip
    try:
        by_kernel = _flock(fd, run_dir)
        before = _read(path)
        if before is not None:
            elsewhere = before.host != socket.gethostname()
            if (elsewhere or not by_kernel) and _alive(before, path):
                raise _refusal(run_dir, before)
            note(f"{path.name} was left by {before}, which is gone; taken over")
        me = Holder.me()
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(dataclasses.asdict(me)).encode(), 0)
        try:
            yield me
        finally:
            # Emptied, not removed: a name that goes away would let two processes lock two different files.
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _flock(fd: int, run_dir: Path) -> bool:
    """Take the kernel's lock; False where the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _refusal(run_dir, _read(run_dir / NAME)) from None
        return False
    return True


def beat(run_dir: Path) -> None:
    """Show other hosts that the holder lives; to be called every BEAT_S seconds."""
    with suppress(OSError):
        os.utime(run_dir / NAME)


@contextmanager
def beating(run_dir: Path) -> Iterator[None]:
    """Beat while the block is busy with what may take longer than SILENT_S."""

    def go_on() -> bool:
        beat(run_dir)
        return False

    with every(BEAT_S, go_on):
        yield


def check(run_dir: Path) -> None:
    """Raise RunError if a run cannot be written here: not a folder, not writable, in use. Leaves nothing behind."""
    run_dir = Path(os.path.abspath(run_dir))  # noqa: PTH100  resolve() would hide the path that the user gave
    ancestor = run_dir
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise RunError(f"{run_dir}: {ancestor} is not a folder; set `run.dir` or `run.name` to another place")
    try:
        Path(tempfile.mkdtemp(prefix=".dtrain-", dir=ancestor)).rmdir()
    except OSError as error:
        raise RunError(f"{run_dir}: cannot write in {ancestor} ({error.strerror}); set `run.dir` to a folder that you "
                       f"can write in") from None  # fmt: skip
    holder = live_holder(run_dir / NAME)
    # Of a host with our name that is not this one, or that was before it was started again, the kernel's lock tells.
    if holder is not None and (holder.is_here or holder.host != socket.gethostname()):
        raise _refusal(run_dir, holder)
