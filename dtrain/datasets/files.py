"""Your own files: JSON lines, JSON, CSV, Parquet, Arrow, plain text; packed, in folders, by patterns."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dtrain.config.spec import spec
from dtrain.datasets._columnar import arrow_rows, parquet_rows
from dtrain.datasets._csv import csv_rows, find_delimiter
from dtrain.datasets._find import COLUMNAR, digest, find, format_of
from dtrain.datasets._json import json_file, json_lines
from dtrain.datasets._lines import PACKED, check_encoding, find_encoding
from dtrain.datasets._text import Unit, find_unit, text_rows
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError


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
        texts = [file for file in files if self._format(file) == "text"]
        unit = self._unit(texts)[0] if texts else "file"
        for file in self._look_at(files):
            for place, row in self._rows_of(file, unit):
                yield f"{file.path}:{place}", row

    def size(self) -> int | None:
        files = self._files()[0]
        if any(file.suffix.lower() in PACKED or self._format(file) in COLUMNAR for file in files):
            return None
        return sum(file.stat().st_size for file in files)

    def digest(self) -> str:
        return digest(self._files()[0])

    def _rows_of(self, file: _File, unit: Unit) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
        how = (file.path, file.encoding, self.max_row_bytes)
        match file.format:
            case "jsonl":
                return json_lines(*how)
            case "json":
                return json_file(*how)
            case "csv" | "tsv":
                return csv_rows(*how, delimiter=file.delimiter, quote=self.quote)
            case "parquet":
                return parquet_rows(file.path)
            case "arrow":
                return arrow_rows(file.path)
            case _:
                return text_rows(*how, unit)

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
