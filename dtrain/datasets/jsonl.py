"""JSON lines: a text or a conversation on each."""

from __future__ import annotations

import difflib
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from dtrain.config.spec import spec
from dtrain.datasets.badrows import BadRowError, BadRows
from dtrain.datasets.base import AbstractRows, Chat, Skipped, Text
from dtrain.errors import DataError

_HASHED_WHOLE = 32 * 2**20
_HASHED_AT_EACH_END = 2**20
_BOM = b"\xef\xbb\xbf"


@spec
class Jsonl(AbstractRows):
    path: str | list[str]
    """A file, a pattern such as `data/*.jsonl`, or a list of these; relative to where you type the command. Each row
    has `text`, or `messages` as a list of `{role, content}`. A name that ends in `.gz` is unpacked while reading."""

    def problems(self) -> list[str]:
        return self._find()[1]

    def examples(self) -> Iterator[Text | Chat | Skipped]:
        files, problems = self._find()
        if problems:
            raise DataError.of(problems)
        bad = BadRows.of(self)
        shape: type[Text | Chat] | None = None
        for file in files:
            for source, line in _lines(file):
                try:
                    example = _example(source, line)
                    shape = shape or type(example)
                    if type(example) is not shape:
                        raise BadRowError(f"has `{_KEYS[type(example)]}`, and the rows before have "
                                            f"`{_KEYS[shape]}`; keep one kind in a dataset")  # fmt: skip
                except BadRowError as error:
                    yield bad.add(source, error)
                    continue
                bad.num_good += 1
                yield example
        bad.check()

    def digest(self) -> str:
        """Of the content, so that a touched or copied file is the same; of a large file, of its place, size, time and
        both ends.
        """
        import xxhash

        state = xxhash.xxh3_128()
        for file in self._find()[0]:
            try:
                with file.open("rb") as opened:
                    _hash(file, opened, state)
            except OSError as error:
                raise DataError(f"dataset.path: {file} cannot be read: {error.strerror}") from error
        return state.hexdigest()

    def _find(self) -> tuple[list[Path], list[str]]:
        """The files, each once, in the order of `path` and by name within a pattern; and what is wrong."""
        names = [self.path] if isinstance(self.path, str) else self.path
        files: dict[Path, None] = {}
        problems = [] if names else ["dataset.path: an empty list; name a file"]
        if "???" in names:
            return [], ["dataset.path: not given; name a file, as in dataset.path=data/train.jsonl"]
        for name in names:
            path = Path(name).expanduser()
            found = _matching(path)
            folders = [each for each in found if each.is_dir()]
            if not found:
                problems.append(_missing(name, path))
            elif folders:
                problems.append(f"dataset.path={name}: {folders[0]} is a folder; name its files, as in "
                                f"{folders[0] / '*.jsonl'}")  # fmt: skip
            files.update(dict.fromkeys(found))
        return list(files), problems


_KEYS: dict[type[Text | Chat], str] = {Text: "text", Chat: "messages"}


def _matching(path: Path) -> list[Path]:
    """By name; a file whose name looks like a pattern is that file."""
    if path.exists():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - a pattern may be absolute


def _missing(name: str, path: Path) -> str:
    if glob.has_magic(name):
        return f"dataset.path={name}: no file matches; correct the pattern"
    folder = path.parent
    if not folder.is_dir():
        return f"dataset.path={name}: there is no folder {folder.absolute()}; correct the path"
    beside = sorted(each.name for each in folder.iterdir() if each.is_file())
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    near = near or [each for each in beside if each.endswith((".jsonl", ".jsonl.gz"))][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "correct the path"
    return f"dataset.path={name}: no such file in {folder.absolute()}; {hint}"


def _hash(file: Path, opened: IO[bytes], state: Any) -> None:
    stat = file.stat()
    state.update(f"\0{file.suffix}\0{stat.st_size}\0".encode())
    if stat.st_size <= _HASHED_WHOLE:
        state.update(opened.read())
    else:
        state.update(f"{file.resolve()}\0{stat.st_mtime_ns}\0".encode())
        state.update(opened.read(_HASHED_AT_EACH_END))
        opened.seek(-_HASHED_AT_EACH_END, 2)
        state.update(opened.read())


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """`file:line` and content of each line that is not blank. Raises DataError."""
    number = 0
    try:
        with _open(file) as opened:
            for number, raw in enumerate(opened, start=1):
                source = f"{file}:{number}"
                data = raw.removeprefix(_BOM).strip() if number == 1 else raw.strip()
                if not data:
                    continue
                yield source, data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: cannot be read: {error}") from error


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _example(source: str, line: bytes) -> Text | Chat:
    """Raises BadRowError."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRowError(f"{_kind(row)} instead of an object; each line is to be one `{{...}}`")
    keys = [key for key in _KEYS.values() if key in row]
    if len(keys) != 1:
        has = "both `text` and `messages`" if keys else f"neither `text` nor `messages`, but {_listed(row)}"
        raise BadRowError(f"has {has}")
    if keys == ["text"]:
        if not _string(row["text"], "`text`").strip():
            raise BadRowError("`text` is empty")
        return Text(source, row["text"])
    if "tools" in row:
        raise BadRowError("has `tools`, which this version would not show to the model; remove them")
    return Chat(source, _messages(row["messages"]))


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise BadRowError(f"`messages` is {_kind(messages)} instead of a list")
    if not messages:
        raise BadRowError("`messages` is empty")
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRowError(f"message {i} is {_kind(message)} instead of an object")
        for key in ("role", "content"):
            if key not in message:
                raise BadRowError(f"message {i} has no `{key}`, but {_listed(message)}")
            _string(message[key], f"`{key}` of message {i}")
        if not message["role"]:
            raise BadRowError(f"message {i} has an empty `role`")
    return messages


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_kind(value)} instead of a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"{name} has half a surrogate pair at character {error.start + 1}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice}` twice")
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in list(row)[:6]) or "nothing"
