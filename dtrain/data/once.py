"""One process makes a thing, and the others wait for it: two launches at once prepare their data once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.2
_SAY_EVERY_S = 10.0
Say = Callable[[str], None]


@contextlib.contextmanager
def alone(lock: Path, what: str, say: Say) -> Iterator[Say]:
    """Hold `lock` for the block, as only one process does at a time; the block gets a function that tells those who
    wait how far it is. The kernel ends the hold with the process, so that another takes over where it dies.

    Nothing depends on it but work that is done twice: where a file system has no locks, this says so and goes on.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(lock, what, say)
    if handle is None:
        say(f"{lock.parent}: this file system has no locks; another launch may prepare {what} at the same time")
        yield lambda line: None
        return
    last = -1.0

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 1:
            last = time.monotonic()
            _write(handle, line)

    try:
        _write(handle, "beginning")
        yield tell
    finally:
        # Removed while it is held: whoever has it open sees that its name is gone, and opens the next.
        lock.unlink(missing_ok=True)
        os.close(handle)


def remove_locks(folder: Path) -> None:
    """Those that processes left behind when they were killed, and that nobody came for."""
    for lock in folder.glob(".*.lock"):
        with contextlib.suppress(OSError):
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(handle, lock):
                    lock.unlink()
            finally:
                os.close(handle)


def _acquire(lock: Path, what: str, say: Say) -> int | None:
    """A handle with the lock, once nobody else has it; None where there are no locks."""
    told, said = -_SAY_EVERY_S, ""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                lock.unlink(missing_ok=True)
                return None
            holder, line = _read(lock)
            if time.monotonic() - told >= _SAY_EVERY_S and (line != said or not said):
                told, said = time.monotonic(), line
                say(f"waiting for {what}: {holder} prepares it: {line}")
            time.sleep(_POLL_S)
            continue
        if _is(handle, lock):
            if said:
                say(f"waited for {what}: the other process has ended")
            return handle
        os.close(handle)


def _is(handle: int, lock: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _write(handle: int, line: str) -> None:
    data = json.dumps({"holder": f"process {os.getpid()} on {platform.node()}", "line": line}).encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))


def _read(lock: Path) -> tuple[str, str]:
    """Who holds it, and how far it is."""
    try:
        found = json.loads(lock.read_bytes())
        return str(found["holder"]), str(found["line"])
    except (OSError, ValueError, KeyError):  # not written yet, or just being written
        return "another process", "beginning"
