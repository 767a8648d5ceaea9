"""Rows of CSV and TSV, by the names in the first line."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.datasets._lines import Lines, unpacked
from dtrain.datasets._values import listed
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

_DELIMITERS = (",", "\t", ";", "|")
_LOOKED_AT = 50


def csv_rows(
    file: Path, encoding: str, limit: int, *, delimiter: str, quote: str
) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    """Line and cells by column of each row. Raises DataError."""
    with unpacked(file) as opened:
        lines = Lines(file, opened, encoding, limit)
        reader = _reader(lines, limit, delimiter, quote)
        names = _header(file, reader)
        start = lines.number + 1
        while True:
            try:
                cells = next(reader, None)
                problem = lines.problem
            except csv.Error as error:
                cells, problem = [], BadRowError(f"not {'TSV' if delimiter == chr(9) else 'CSV'}: {error}")
            if cells is None:
                break
            if problem or cells:  # else the line was blank
                yield str(start), problem or _row(names, cells)
            start = lines.number + 1


def find_delimiter(file: Path, encoding: str, limit: int, *, quote: str) -> str:
    """The one that cuts the first rows into the most cells, each row into as many; a comma where there is none."""
    best, most = ",", 1
    for delimiter in _DELIMITERS:
        with unpacked(file) as opened:
            nums = []
            with contextlib.suppress(csv.Error):  # what is wrong with a row is told when it is read
                for cells in islice(_reader(Lines(file, opened, encoding, limit), limit, delimiter, quote), _LOOKED_AT):
                    nums += [len(cells)] if cells else []
        if nums and sum(num == nums[0] for num in nums) >= 0.9 * len(nums) and nums[0] > most:
            best, most = delimiter, nums[0]
    return best


def _reader(lines: Lines, limit: int, delimiter: str, quote: str) -> Any:
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    if not quote:
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=True)


def _header(file: Path, reader: Any) -> list[str]:
    try:
        names = [name.strip() for name in next((cells for cells in reader if cells), [])]
    except csv.Error as error:
        raise DataError(f"{file}:1: not CSV: {error}") from error
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{file}:1: two columns of the name {listed(twice)}; the first line is to name the columns")
    return names


def _row(names: list[str], cells: list[str]) -> dict[str, Any] | BadRowError:
    if len(cells) != len(names):
        return BadRowError(f"another number of cells than the first line names: {len(cells)} instead of {len(names)}; "
                           f"quote cells that hold the delimiter or a line break")  # fmt: skip
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}
