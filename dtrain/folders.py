"""Folders that appear whole or not at all, whoever else makes them at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain.failpoints import reach

_PREFIX = ".tmp-"


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to fill; it becomes `final` at the end of the block, and is gone after an error.

    Where another process was first, its folder stays and this one goes.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(final.parent)
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        try:
            partial.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove what is there at once for all who look for it; those who have its files open keep them."""
    aside = temporary(folder.parent)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    reach("discard")
    _remove(aside)


def remove_leftovers(parent: Path, *, mine: bool = False) -> list[Path]:
    """Remove what processes of this machine left unfinished when they were killed; returns what is gone now.

    `mine`: the caller is the only one who writes here, so that whatever is unfinished is nobody's.
    """
    left = [path for path in parent.glob(f"{_PREFIX}*") if mine or _left(path)]
    for path in left:
        _remove(path)
    return [path for path in left if not os.path.lexists(path)]


def _remove(path: Path) -> None:
    """As far as it can be; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _left(path: Path) -> bool:
    """Whether this machine made it, in a process that is gone."""
    return path.name.startswith(f"{_PREFIX}{platform.node()}-") and not _alive(path.name.split("-")[-2])


def temporary(parent: Path) -> Path:
    """A name beside others that no one else uses, which `remove_leftovers` knows."""
    return parent / f"{_PREFIX}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def sync(path: Path) -> None:
    """Have the disk hold what the file or folder `path` holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems have no such thing for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def begin_flush(handle: int, start: int, num_bytes: int) -> None:
    """Have the disk begin with what was written there, and do not wait: the flush at the end is then a short one."""
    if sys.platform == "linux":
        # There it starts to write what is changed, and drops what is not; on others it may mean less.
        os.posix_fadvise(handle, start, num_bytes, os.POSIX_FADV_DONTNEED)
