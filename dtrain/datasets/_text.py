"""Plain text: a document is a file, a paragraph or a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dtrain.datasets._lines import Lines, not_in, placed_lines, unpacked
from dtrain.datasets.badrows import BadRowError

Unit = Literal["file", "paragraph", "line"]
_LOOKED_AT = 2000
_LARGE = 2**24

_Found = Iterator[tuple[str, dict[str, Any] | BadRowError]]


def text_rows(file: Path, encoding: str, limit: int, unit: Unit, start: int = 0, end: int | None = None) -> _Found:
    """Line and text of each document; blank ones are none. `start` and `end`, for lines only, as for `placed_lines`.
    Raises DataError.
    """
    with unpacked(file) as opened:
        if unit == "file":
            document = _decoded(opened.read(limit + 1), encoding, limit)
            if isinstance(document, BadRowError) or document["text"].strip():
                yield "1", document
        elif unit == "line":
            for place, line, problem in placed_lines(file, opened, encoding, limit, start, end):
                if problem or line.strip():
                    yield place, problem or {"text": line.rstrip("\r\n")}
        else:
            yield from _paragraphs(Lines(file, opened, encoding, limit), limit)


def find_unit(files: Sequence[Path], encoding: str, limit: int) -> tuple[Unit, str]:
    """What a document is, and why: several files that are not large are one each; within a large one, or the only one,
    it is what blank lines divide, or a line where there are none. Raises DataError.
    """
    if len(files) > 1 and all(file.stat().st_size <= _LARGE for file in files):
        return "file", "there are several"
    with unpacked(files[0]) as opened:
        if any(not line.strip() for line in islice(Lines(files[0], opened, encoding, limit), _LOOKED_AT)):
            return "paragraph", "blank lines divide it"
    return "line", "no blank lines divide it"


def _decoded(data: bytes, encoding: str, limit: int) -> dict[str, Any] | BadRowError:
    if len(data) > limit:
        return BadRowError(f"longer than dataset.max_row_bytes={limit}: raise it, or set dataset.text_unit=paragraph")
    try:
        return {"text": data.decode(encoding).removeprefix("\ufeff")}
    except UnicodeDecodeError as error:
        return not_in(encoding, error, "file")


def _paragraphs(lines: Lines, limit: int) -> _Found:
    parts: list[str] = []
    start, num = 1, 0
    problem: BadRowError | None = None
    for line in lines:
        if line.strip() or lines.problem:
            start = start if parts or problem else lines.number
            num += len(line)
            problem = problem or lines.problem
            if num > limit:
                problem = BadRowError(f"longer than dataset.max_row_bytes={limit}: divide it by blank lines")
            if problem:
                parts.clear()
            else:
                parts.append(line)
        elif parts or problem:
            yield str(start), problem or {"text": "".join(parts).rstrip("\r\n")}
            parts.clear()
            num, problem = 0, None
    if parts or problem:
        yield str(start), problem or {"text": "".join(parts).rstrip("\r\n")}
