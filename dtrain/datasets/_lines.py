"""A file as lines of text: unpacked, decoded, counted, and none longer than is allowed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast, final

from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

PACKED = (".gz", ".bz2", ".xz", ".zst")
_SAMPLE = 2**18
_LOOKED_THROUGH = 2**25
_BUFFER = 2**20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"\x84\x31\x95\x33", "gb18030"),
)  # fmt: skip
_NO_ASCII = re.compile(rb"[^\x00-\x7f]")
_NO_TEXT = {"Cc", "Cn", "Co", "Cs"}
"""Kinds of characters that no text has: those for control, for nothing, for private use, and halves."""
_LETTERS = 5000
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """The content of a file, packed or not. Raises DataError, also for what breaks while it is read."""
    try:
        with _open(file) as opened:
            yield opened
    except _BROKEN as error:
        said = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file}: cannot be read: {said}") from error


def _open(file: Path) -> IO[bytes]:
    match file.suffix.lower():
        case ".gz":
            return cast("IO[bytes]", io.BufferedReader(cast("Any", gzip.open(file, "rb")), _BUFFER))
        case ".bz2":
            return cast("IO[bytes]", bz2.open(file, "rb"))
        case ".xz":
            return cast("IO[bytes]", lzma.open(file, "rb"))
        case ".zst":
            import pyarrow as pa

            raw = pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")
            return cast("IO[bytes]", io.BufferedReader(cast("Any", raw), _BUFFER))
        case _:
            return file.open("rb", buffering=_BUFFER)


def find_encoding(file: Path) -> str:
    """By its first bytes: a mark at the beginning, else UTF-8, UTF-16 or GB18030; UTF-8 where it is none of them, so
    that each line that is not can be told. Raises DataError.
    """
    with unpacked(file) as opened:
        sample = opened.read(_SAMPLE)
        looked = len(sample)
        while sample.isascii() and b"\0" not in sample and looked < _LOOKED_THROUGH and (more := opened.read(_SAMPLE)):
            # Only the first line with another letter tells; the rest of a line before it is of no use.
            sample, looked = more[max(0, more.find(b"\n")) :] if not more.isascii() else more, looked + len(more)
    for mark, encoding in _BOMS:
        if sample.startswith(mark):
            return encoding
    if b"\0" in sample:
        return _wide(sample)
    return "utf-8" if _is(sample, "utf-8") or not _is_chinese(sample) else "gb18030"


def _is(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(sample)  # a letter that is cut off at the end is no error
    except UnicodeDecodeError:
        return False
    return True


def _wide(sample: bytes) -> str:
    """UTF-16 without a mark, by where the zeros are; UTF-8 where they are anywhere."""
    half = len(sample) // 2
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    often = max(even, odd) > half / 5
    if min(even, odd) > half / 50 or (not often and _is(sample, "utf-8")):
        return "utf-8"
    encoding = "utf-16-le" if odd > even else "utf-16-be"
    letters = sample[: 2 * _LETTERS].decode(encoding, "replace")[:-1]  # the last one may be cut
    odd_ones = {letter for letter in letters if unicodedata.category(letter) in _NO_TEXT} - set("\t\r\n")
    return encoding if _is(sample, encoding) and not odd_ones else "utf-8"


def _is_chinese(sample: bytes) -> bool:
    """Whether its lines are GB18030, and not only by chance: most of those beyond ASCII are not UTF-8, and most of
    their letters are common Chinese ones.
    """
    lines = [line for line in sample.split(b"\n")[:-1] or [sample] if _NO_ASCII.search(line)]
    if sum(_is(line, "utf-8") for line in lines) >= len(lines) / 2:
        return False
    letters = [letter for letter in sample.decode("gb18030", "ignore") if not letter.isascii()][:_LETTERS]
    common = 0
    for letter in letters:
        code = letter.encode("gb2312", "ignore")
        common += bool(code) and code[0] <= 0xD7  # punctuation and the 3,755 letters of the first level
    return common > 0.8 * len(letters)


def check_encoding(name: str) -> str | None:
    """What is wrong with the name of an encoding."""
    try:
        codecs.lookup(name)
        b"a".decode(name)  # there are codecs for other things than text
    except (LookupError, ValueError):
        return f"dataset.encoding={name}: no such encoding; such as utf-8, utf-16, gb18030, big5, latin-1"
    return None


def is_wide(encoding: str) -> bool:
    """Whether a newline is more than one byte."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


class _Recoded(io.RawIOBase):
    """UTF-8 instead of an encoding in which a newline is not one byte."""

    def __init__(self, opened: IO[bytes], encoding: str) -> None:
        super().__init__()
        self._opened = opened
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        view = memoryview(into)
        while not self._rest:
            data = self._opened.read(len(view))
            self._rest = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        num = min(len(view), len(self._rest))
        view[:num], self._rest = self._rest[:num], self._rest[num:]
        return num


@final
class Lines:
    """The lines of a file, with their ends. Iterate over it; `number` and `problem` are of the line that came last."""

    number: int = 0
    problem: BadRowError | None = None
    """The line is too long, or cannot be decoded: what came instead is not to be used."""

    def __init__(self, file: Path, opened: IO[bytes], encoding: str, limit: int) -> None:
        """`limit`: bytes of a line. Iterating raises DataError where nothing after a place can be decoded."""
        self._file, self._limit, self._encoding = file, limit, codecs.lookup(encoding).name
        self._opened, self._decoded = opened, self._encoding
        if is_wide(self._encoding):
            self._opened = cast("IO[bytes]", io.BufferedReader(_Recoded(opened, encoding), _BUFFER))
            self._decoded = "utf-8"

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        self.number += 1
        self.problem = None
        try:
            data = self._opened.readline(self._limit + 1)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._file}: not {self._encoding.upper()} soon after line {self.number}: "
                            f"{error.reason}; name the right dataset.encoding") from error  # fmt: skip
        if not data:
            self.number -= 1
            raise StopIteration
        if len(data) > self._limit:
            while data and not data.endswith(b"\n"):
                data = self._opened.readline(_BUFFER)
            self.problem = BadRowError(f"longer than dataset.max_row_bytes={self._limit}: raise it, or cut the row")
            return "\n"
        try:
            text = data.decode(self._decoded)
        except UnicodeDecodeError as error:
            self.problem = not_in(self._encoding, error)
            return data.decode(self._decoded, "replace")
        return text.removeprefix("\ufeff") if self.number == 1 else text


def placed_lines(
    file: Path, opened: IO[bytes], encoding: str, limit: int, start: int = 0, end: int | None = None
) -> Iterator[tuple[str, str, BadRowError | None]]:
    """Place, text and problem of each line that begins at byte `start` or after it, and before `end`. The place is the
    line's number, or after another start than 0 its byte, as `byte 4096`. Only `encoding`s with newlines of one byte
    have other starts and ends than those of the file.
    """
    if start:
        opened.seek(start - 1)
        while (rest := opened.readline(_BUFFER)) and not rest.endswith(b"\n"):
            pass
    lines, at = Lines(file, opened, encoding, limit), 0
    while end is None or (at := opened.tell()) < end:
        text = next(lines, None)
        if text is None:
            return
        yield f"byte {at}" if start else str(lines.number), text, lines.problem


def line_at(file: Path, byte: int) -> int:
    """The number of the line that begins at this byte; reads the file up to there."""
    number = 1
    with unpacked(file) as opened:
        while byte > 0 and (data := opened.read(min(byte, _BUFFER))):
            number, byte = number + data.count(b"\n"), byte - len(data)
    return number


def not_in(encoding: str, error: UnicodeDecodeError, what: str = "line") -> BadRowError:
    return BadRowError(f"not {encoding.upper()}: byte {error.start + 1} of the {what}; save the file as UTF-8, or name "
                       f"its dataset.encoding")  # fmt: skip
