"""Folders that appear whole or not at all, whoever else makes them at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
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
    """Remove a folder at once for all who look for it; those who have its files open keep them."""
    aside = temporary(folder.parent)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    reach("discard")
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: Path, *, mine: bool = False) -> list[Path]:
    """Remove what processes of this machine left unfinished when they were killed; returns what was removed.

    `mine`: the caller is the only one who writes here, so that whatever is unfinished is nobody's.
    """
    left = [path for path in parent.glob(f"{_PREFIX}*") if mine or _left(path)]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left


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
    finally:
        os.close(handle)
