"""Rows of JSON: one on each line, a list of them, or columns; read piece by piece but for the last."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, final

from dtrain.datasets._lines import Lines, placed_lines, unpacked
from dtrain.datasets._values import kind
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

Row = tuple[str, dict[str, Any] | BadRowError]
"""Its place in the file, and its values by column."""
_CHUNK = 2**20
_NEAR_THE_END = 16
"""Characters before the end of what is read where a mistake may only be that the rest is missing."""
_WHOLE = 2**28
_WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "train"}
"""Keys under which all rows of a file may lie."""


def json_lines(file: Path, encoding: str, limit: int, start: int = 0, end: int | None = None) -> Iterator[Row]:
    """One object on each line; blank lines are none. `start` and `end` as for `placed_lines`. Raises DataError."""
    with unpacked(file) as opened:
        parse = _Parser()
        for place, text, problem in placed_lines(file, opened, encoding, limit, start, end):
            if problem:
                yield place, problem
            elif text := text.strip():
                yield place, parse(text)


def json_file(file: Path, encoding: str, limit: int) -> Iterator[Row]:
    """A list of objects, an object of lists, or objects one after the other. Raises DataError."""
    with unpacked(file) as opened:
        head = _Values(file, opened, encoding, limit)
        first = head.peek()
        if first == "[":
            yield from head.elements()
            return
    if first not in ("", "{"):
        raise DataError(f"{file}: neither a list of objects nor an object; it begins with {first!r}")
    with unpacked(file) as opened:
        lines = Lines(file, opened, encoding, limit)
        line = next((line for line in lines if line.strip()), "")
        one_a_line = lines.problem is None and isinstance(_Parser()(line), dict) and any(each.strip() for each in lines)
    if one_a_line:
        yield from json_lines(file, encoding, limit)
    elif first:
        with unpacked(file) as opened:
            yield from _whole(file, opened, encoding, limit)


@final
class _Keys:
    """Makes objects, and remembers a key that was there twice."""

    def __init__(self) -> None:
        self._twice: str | None = None

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            self._twice = next(name for name in names if names.count(name) > 1)
        return found

    def checked(self, row: Any) -> dict[str, Any] | BadRowError:
        """The row that was made last."""
        twice, self._twice = self._twice, None
        if twice is not None:
            return BadRowError(f"a key is there twice: `{twice}`")
        if not isinstance(row, dict):
            return BadRowError(f"{kind(row)} instead of an object: each row is to be one `{{...}}`")
        return row


@final
class _Parser:
    """Text of a row to the row."""

    def __init__(self) -> None:
        self._keys = _Keys()
        self._json = json.JSONDecoder(object_pairs_hook=self._keys)

    def __call__(self, text: str) -> dict[str, Any] | BadRowError:
        try:
            row = self._json.decode(text)
        except json.JSONDecodeError as error:
            found = BadRowError(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            found = BadRowError(f"not JSON: {error}")
        else:
            return self._keys.checked(row)
        self._keys.checked(None)  # forget what was found before the mistake
        return found


@final
class _Values:
    """JSON values of a file, read as they are asked for."""

    def __init__(self, file: Path, opened: IO[bytes], encoding: str, limit: int) -> None:
        self._file, self._opened, self._limit = file, opened, limit
        self._encoding = codecs.lookup(encoding).name
        self._bytes = codecs.getincrementaldecoder(encoding)()
        self._keys = _Keys()
        self._json = json.JSONDecoder(object_pairs_hook=self._keys)
        self._text, self._at, self._ended = "", 0, False
        self._line, self._line_of = 1, 0
        """The line of a place in the text."""

    def peek(self) -> str:
        """The next character that is no white space, which stays; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n\ufeff":
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(_CHUNK)

    def elements(self) -> Iterator[Row]:
        """Those of the list that begins here. Raises DataError where it cannot be read on."""
        self._at += 1
        if self.peek() == "]":
            self._at += 1
        else:
            while True:
                yield self._row()
                sign = self.peek()
                if sign not in (",", "]"):
                    raise self._error("ends within the list" if not sign else f"{sign!r} instead of a comma or ]")
                self._at += 1
                if sign == "]":
                    break
        if sign := self.peek():
            raise self._error(f"{sign!r} after the end of the list")

    def one_after_the_other(self) -> Iterator[Row]:
        """All values of the file. Raises DataError where it cannot be read on."""
        while self.peek():
            yield self._row()

    def _row(self) -> Row:
        self.peek()
        self._pass_lines()
        return str(self._line), self._keys.checked(self._value())

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_THE_END
                if self._ended or not cut:
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(str(error)) from error
            else:
                if end < len(self._text) or self._ended:  # a number could go on
                    self._check_length(end)
                    self._at = end
                    return value
            self._check_length(len(self._text))
            self._more(max(_CHUNK, len(self._text) - self._at))

    def _check_length(self, end: int) -> None:
        if end - self._at > self._limit:
            raise self._error(f"a row longer than dataset.max_row_bytes={self._limit}; raise it, or cut the row")

    def _more(self, num: int) -> None:
        self._pass_lines()
        self._text, self._at, self._line_of = self._text[self._at :], 0, 0
        data = self._opened.read(num)
        self._ended = not data
        try:
            self._text += self._bytes.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self._line_at(len(self._text)) + data.count(b"\n", 0, error.start)
            raise DataError(f"{self._file}:{line}: not {self._encoding.upper()}; save the file as UTF-8, or name its "
                            f"dataset.encoding") from error  # fmt: skip

    def _pass_lines(self) -> None:
        """Move what is known of lines to where reading is; each character is looked at once."""
        self._line, self._line_of = self._line_at(self._at), self._at

    def _line_at(self, at: int) -> int:
        return self._line + self._text.count("\n", self._line_of, at)

    def _error(self, said: str, at: int | None = None) -> DataError:
        at = self._at if at is None else at
        column = at - self._text.rfind("\n", 0, at)
        return DataError(f"{self._file}:{self._line_at(at)}: not JSON: {said} (column {column}); repair the file: no "
                         f"row after this can be read")  # fmt: skip


def _whole(file: Path, opened: IO[bytes], encoding: str, limit: int) -> Iterator[Row]:
    """An object over several lines, or objects that are. Raises DataError."""
    data = opened.read(_WHOLE + 1)
    if len(data) > _WHOLE:
        raise DataError(f"{file}: an object of more than {_WHOLE // 2**20} MiB would have to be in memory at once; "
                        f"write it as JSON lines, a row on each")  # fmt: skip
    try:
        keys = _Keys()
        found = keys.checked(json.loads(data.decode(encoding).removeprefix("\ufeff"), object_pairs_hook=keys))
    except (ValueError, RecursionError):
        with unpacked(file) as again:  # objects one after the other, or a mistake, of which this tells the place
            yield from _Values(file, again, encoding, max(limit, len(data))).one_after_the_other()
        return
    if isinstance(found, BadRowError):
        raise DataError(f"{file}: {found}")
    yield from _rows_of(file, found)


def _rows_of(file: Path, found: dict[str, Any]) -> Iterator[Row]:
    """Of columns, as lists or as objects by row; of a list of rows under a key for it; or the one row that it is."""
    values = list(found.values())
    columns = [list(value.values()) if isinstance(value, dict) else value for value in values]
    wrapper = next((name for name in found if name in _WRAPPERS and _is_rows(found[name])), None)
    if wrapper:
        for i, row in enumerate(found[wrapper], start=1):
            yield f"row {i}", row
    elif columns and all(isinstance(column, list) for column in columns):
        lengths = {name: len(column) for name, column in zip(found, columns, strict=True)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{file}: columns of different length: "
                            f"{', '.join(f'`{name}` {num}' for name, num in lengths.items())}")  # fmt: skip
        for i, row in enumerate(zip(*columns, strict=True), start=1):
            yield f"row {i}", dict(zip(found, row, strict=True))
    else:
        yield "1", found


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
