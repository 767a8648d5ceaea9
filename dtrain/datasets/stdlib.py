"""The source files of the Python standard library: real text that every machine already has."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dtrain.config.spec import spec
from dtrain.datasets.base import AbstractRows, Skipped, Text

_LARGEST_BYTES = 200_000
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
# One table per code page: much of it, and nothing to learn from.
_TABLES = {"encodings", "pydoc_data"}


@spec
class Stdlib(AbstractRows):
    max_length: Annotated[int, Field(ge=2)] = 256
    max_files: Annotated[int, Field(ge=1)] | None = 250
    """The first so many files by name, about 4 MB; all of them, about 9 MB, when null."""

    def shapes(self) -> Sequence[type[Text]]:
        return (Text,)

    def examples(self) -> Iterator[Text | Skipped]:
        for name, path in self._files():
            if path.stat().st_size > _LARGEST_BYTES:
                yield Skipped(name, f"file over {_LARGEST_BYTES // 1000} kB")
                continue
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                yield Skipped(name, "file is not UTF-8")
                continue
            if text.strip():
                yield Text(f"{name}:1", text)
            else:
                yield Skipped(name, "file is empty")

    def digest(self) -> str:
        import xxhash

        state = xxhash.xxh3_128()
        for name, path in self._files():
            stat = path.stat()
            state.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def _files(self) -> list[tuple[str, Path]]:
        """Name relative to the library, and path; by name, so that the order is the same on every machine."""
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS | _TABLES]
            paths = [Path(folder, name) for name in names if name.endswith(".py")]
            found += [(path.relative_to(root).as_posix(), path) for path in paths]
        return sorted(found)[: self.max_files]
