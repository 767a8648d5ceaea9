"""Your own files: JSON lines, JSON, CSV, Parquet, Arrow, plain text; packed, in folders, by patterns."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dtrain.config.spec import Span, spec
from dtrain.datasets._columnar import arrow_rows, num_row_groups, parquet_rows
from dtrain.datasets._csv import csv_rows, find_delimiter
from dtrain.datasets._find import COLUMNAR, digest, find, format_of
from dtrain.datasets._json import json_file, json_lines
from dtrain.datasets._lines import PACKED, check_encoding, find_encoding, is_wide, line_at
from dtrain.datasets._text import Unit, find_unit, text_rows
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError

_SPANS_A_SHARD = 16
"""Of files whose lines are dealt out by bytes: so many that shards differ little in size."""
_LEAST_BYTES, _MOST_BYTES = 2**16, 2**23
"""Of such a span: what is read again where a stream goes on."""
_COUNTED_BYTES = 2**32
"""A line that begins further on is told by its byte: to count the lines before it would take too long."""


@spec
class Files(AbstractTable):
    path: str | list[str]
    """A file, a folder, a pattern such as `data/*.jsonl`, or a list of these; relative to where you type the command.
    Files whose names end in .gz, .bz2, .xz or .zst are unpacked while reading."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"] = "auto"
    """Of all the files; `auto` goes by the ending of each."""
    encoding: str = "auto"
    """Of all the text in them, such as utf-8, utf-16, gb18030, big5, latin-1; `auto` finds UTF-8, UTF-16 and GB18030,
    and prints it."""
    delimiter: str = "auto"
    """Between the cells of a CSV file: a character, or `tab`; `auto` finds it, and prints it."""
    quote: Annotated[str, Field(max_length=1)] = '"'
    """Around the cells of a CSV file that need it; empty where no quotes are meant."""
    text_unit: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What of a plain text is one document; `auto` is a file where there are several, else what blank lines divide,
    else a line."""
    max_row_bytes: Annotated[int, Field(ge=1)] = 2**26
    """The longest row; a longer one is a bad row, and never in memory."""

    def problems(self) -> list[str]:
        found = [*super().problems(), *self._find()[2]]
        if self.encoding != "auto" and (wrong := check_encoding(self.encoding)):
            found.append(wrong)
        if self.delimiter not in ("auto", "tab") and len(self.delimiter) != 1:
            found.append(f"dataset.delimiter={self.delimiter}: neither one character nor `tab`")
        return found

    def about(self) -> list[str]:
        files, passed = self._files()
        kinds = Counter(file.words for file in self._look_at(files))
        what = str(files[0]) if len(files) == 1 else f"{len(files)} files"
        lines = [f"{what}: {', '.join(f'{num} {kind}' if len(files) > 1 else kind for kind, num in kinds.items())}"]
        if passed:
            lines.append(f"files passed over: {', '.join(f'{num} {ending}' for ending, num in sorted(passed.items()))}")
        texts = [file for file in files if self._format(file) == "text"]
        if texts:
            unit, why = self._unit(texts)
            lines.append(f"plain text, a document for each {unit}{why}")
        return lines

    def rows(self) -> Iterator[Found]:
        files, _ = self._files()
        unit = self._unit_of(files)
        for file in self._look_at(files):
            for place, row in self._rows_of(file, unit):
                yield f"{file.path}:{place}", row

    def spans(self) -> Sequence[Span]:
        """Lines by bytes, Parquet by row groups; any other file as a whole."""
        files, _ = self._files()
        if not files:
            return ()
        lines = {file.path for file in self._looked_at.values() if self._in_lines(file)}
        total = sum(path.stat().st_size for path in lines)
        each = min(max(total // (_SPANS_A_SHARD * self.stream_shards), _LEAST_BYTES), _MOST_BYTES)
        found = []
        for path, file in self._looked_at.items():
            if path in lines:
                size = path.stat().st_size
                found += [Span(str(path), at, min(at + each, size)) for at in range(0, size, each)]
            elif file.format == "parquet":
                found += [Span(str(path), i, i + 1) for i in range(num_row_groups(path))]
            else:
                found.append(Span(str(path)))
        return found

    def rows_in(self, span: Span) -> Iterator[Found]:
        file = self._looked_at[Path(span.name)]
        for place, row in self._rows_of(file, self._unit_found, span.start, span.end):
            yield f"{file.path}:{place}", row

    def told(self, source: str) -> str:
        name, _, byte = source.rpartition(":byte ")
        return f"{name}:{line_at(Path(name), int(byte))}" if name and int(byte) < _COUNTED_BYTES else source

    def size(self) -> int | None:
        files = self._files()[0]
        if any(file.suffix.lower() in PACKED or self._format(file) in COLUMNAR for file in files):
            return None
        return sum(file.stat().st_size for file in files)

    def digest(self) -> str:
        return digest(self._files()[0])

    def _rows_of(self, file: _File, unit: Unit, start: int = 0,
                 end: int | None = None) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:  # fmt: skip
        how = (file.path, file.encoding, self.max_row_bytes)
        match file.format:
            case "jsonl":
                return json_lines(*how, start, end)
            case "json":
                return json_file(*how)
            case "csv" | "tsv":
                return csv_rows(*how, delimiter=file.delimiter, quote=self.quote)
            case "parquet":
                return parquet_rows(file.path, start, end)
            case "arrow":
                return arrow_rows(file.path)
            case _:
                return text_rows(*how, unit, start, end)

    @cached_property
    def _looked_at(self) -> dict[Path, _File]:
        """For spans, of which there are many: found out once."""
        return {file.path: file for file in self._look_at(self._files()[0])}

    @cached_property
    def _unit_found(self) -> Unit:
        return self._unit_of(list(self._looked_at))

    def _in_lines(self, file: _File) -> bool:
        """Whether any byte of it can be told to be in a line, and a row is a line."""
        lines = file.format == "jsonl" or (file.format == "text" and self._unit_found == "line")
        return lines and file.path.suffix.lower() not in PACKED and not is_wide(file.encoding)

    def _find(self) -> tuple[list[Path], Counter[str], list[str]]:
        names = [self.path] if isinstance(self.path, str) else self.path
        return find(names, any_ending=self.format != "auto")

    def _files(self) -> tuple[list[Path], Counter[str]]:
        files, passed, problems = self._find()
        if problems:
            raise DataError.of(problems)
        return files, passed

    def _look_at(self, files: Sequence[Path]) -> Iterator[_File]:
        for path in files:
            kind = self._format(path)
            encoding = "" if kind in COLUMNAR else self._encoding(path)
            yield _File(path, kind, encoding, self._delimiter(path, kind, encoding))

    def _format(self, file: Path) -> str:
        return self.format if self.format != "auto" else format_of(file) or "text"

    def _encoding(self, file: Path) -> str:
        return find_encoding(file) if self.encoding == "auto" else self.encoding

    def _delimiter(self, file: Path, kind: str, encoding: str) -> str:
        if kind not in ("csv", "tsv"):
            return ""
        if self.delimiter != "auto":
            return "\t" if self.delimiter == "tab" else self.delimiter
        return "\t" if kind == "tsv" else find_delimiter(file, encoding, self.max_row_bytes, quote=self.quote)

    def _unit_of(self, files: Sequence[Path]) -> Unit:
        texts = [file for file in files if self._format(file) == "text"]
        return self._unit(texts)[0] if texts else "file"

    def _unit(self, texts: Sequence[Path]) -> tuple[Unit, str]:
        if self.text_unit != "auto":
            return self.text_unit, ""
        unit, why = find_unit(texts, self._encoding(texts[0]), self.max_row_bytes)
        return unit, f", since {why}; dataset.text_unit=file, paragraph or line says otherwise"


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    path: Path
    format: str
    encoding: str
    """Empty where the format says it itself."""
    delimiter: str
    """Empty where there are no cells."""

    @property
    def words(self) -> str:
        """`csv in gb18030 with ; between cells`."""
        between = {"\t": "tabs", " ": "spaces"}.get(self.delimiter, self.delimiter)
        return (self.format + (f" in {self.encoding}" if self.encoding else "")
                + (f" with {between} between cells" if between else ""))  # fmt: skip
