"""JSON on disk: small writes that are whole or not there at all, and reads that pass over what is neither."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """`value` with what JSON has no number for as None, at any depth; paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return finite(float(value)) if hasattr(value, "__float__") else str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step: a reader sees the old file or the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, value)


def replace_json(path: Path, value: Any) -> None:
    """The same, in a folder that is there."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w", encoding="utf-8") as file:
        file.write(dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is none, or not a whole one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def append_json(path: Path, value: Any) -> None:
    """Add one line in a single write, so that lines of several processes never mix."""
    line = (dumps(value) + "\n").encode("utf-8", errors="replace")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, none where there is no file; what is no whole line, as a kill leaves it, is
    passed over.
    """
    if not path.exists():
        return
    # Not by str.splitlines: what a model wrote may have U+2028 and other ends of lines, which JSON leaves as they are.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def last_json(path: Path, *, tail_bytes: int = 65536) -> dict[str, Any] | None:
    """The last whole line of a file of JSON lines; reads only its end."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail_bytes))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None
