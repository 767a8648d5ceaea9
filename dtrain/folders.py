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

_PREFIX = ".tmp-"


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to fill; it becomes `final` at the end of the block, and is gone after an error.

    Where another process was first, its folder stays and this one goes.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final.parent)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder at once for all who look for it; those who have its files open keep them."""
    aside = _temporary(folder.parent)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what processes of this machine left unfinished when they were killed; returns what was removed."""
    left = [path for path in parent.glob(f"{_PREFIX}{platform.node()}-*-*") if not _alive(path.name.split("-")[-2])]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _temporary(parent: Path) -> Path:
    return parent / f"{_PREFIX}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
