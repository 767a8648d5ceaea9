"""From what `dataset.path` says to files, and a digest of what they hold."""

from __future__ import annotations

import difflib
import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dtrain.datasets._lines import PACKED
from dtrain.errors import DataError

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".text": "text",
}  # fmt: skip
"""By ending. Others need `dataset.format`."""
COLUMNAR = ("parquet", "arrow")
"""Formats that are read from any place in the file, and have no text encoding."""
_TEXTS_BY_NAME = {".md": "text", ".rst": "text"}
"""Endings of texts that often only explain what else is in a folder: read where they are named."""
_SAVED = ("dataset_info.json", "state.json")
"""What `datasets` leaves in a folder that it saves."""
_WHOLE = 2**25
_WHOLE_IN_ALL = 2**29
_AT_EACH_END = 2**20


def format_of(file: Path) -> str | None:
    """By its ending, without that of a packed file; None where it says nothing, or such a file is not read packed."""
    packed = file.suffix.lower() in PACKED
    suffix = (Path(file.stem).suffix if packed else file.suffix).lower()
    found = FORMATS.get(suffix) or _TEXTS_BY_NAME.get(suffix)
    return None if packed and found in COLUMNAR else found


def find(names: Sequence[str], *, any_ending: bool) -> tuple[list[Path], Counter[str], list[str]]:
    """The files, each once, in the order of `names` and by name within a pattern or folder; how many of each ending
    were passed over there; and what is wrong. `any_ending`: nothing is passed over, and nothing wrong for that.
    """
    files: dict[Path, None] = {}
    passed: Counter[str] = Counter()
    if not names:
        return [], passed, ["dataset.path: an empty list; name a file"]
    if "???" in names:
        return [], passed, ["dataset.path: not given; name a file, as in dataset.path=data/train.jsonl"]
    problems = []
    for name in names:
        path = Path(name).expanduser()
        matching = _matching(path)
        if not matching:
            problems.append(_missing(name, path))
            continue
        problems += [_saved(name, each) for each in matching if is_saved(each)]
        there = [(file, each.is_dir()) for each in matching for file in (inside(each) if each.is_dir() else [each])]
        known = [file for file, below in there if any_ending or (_in_folder(file) if below else format_of(file))]
        if known:
            taken = set(known)
            passed.update(file.suffix.lower() or file.name for file, _ in there if file not in taken)
            files.update(dict.fromkeys(known))
        else:
            problems.append(_unknown(name, [file for file, _ in there]))
    return list(files), passed, problems


def digest(files: Sequence[Path]) -> str:
    """Of the content, so that a touched or copied file is the same; of a large file, and of many, also of its place,
    size, time and both ends instead. Raises DataError.
    """
    import xxhash

    state, whole = xxhash.xxh3_128(), _WHOLE_IN_ALL
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                state.update(f"\0{''.join(file.suffixes[-2:])}\0{size}\0".encode())
                if size <= min(_WHOLE, whole):
                    whole -= size
                    state.update(opened.read())
                else:
                    _hash_ends(file, opened, state)
        except OSError as error:
            raise DataError(f"dataset.path: {file} cannot be read: {error.strerror}") from error
    return state.hexdigest()


def _hash_ends(file: Path, opened: IO[bytes], state: Any) -> None:
    state.update(f"{file.resolve()}\0{file.stat().st_mtime_ns}\0".encode())
    state.update(opened.read(_AT_EACH_END))
    opened.seek(max(0, file.stat().st_size - _AT_EACH_END))
    state.update(opened.read())


def _in_folder(file: Path) -> bool:
    return format_of(file) is not None and file.suffix.lower() not in _TEXTS_BY_NAME


def _matching(path: Path) -> list[Path]:
    """By name; a file whose name looks like a pattern is that file."""
    if path.exists():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - a pattern may be absolute


def inside(folder: Path) -> list[Path]:
    """All files in it and below, by name; hidden ones are none."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED)


def _saved(name: str, folder: Path) -> str:
    return f"dataset.path={name}: {folder} was saved by the datasets library; type dataset=hub dataset.name={folder}"


def _unknown(name: str, files: Sequence[Path]) -> str:
    if not files:
        return f"dataset.path={name}: a folder in which there is no file; name another, or put the files there"
    endings = ", ".join(sorted({"".join(file.suffixes[-2:]) or file.name for file in files})[:6])
    return (f"dataset.path={name}: no ending there tells a format (there is {endings}; known are "
            f"{', '.join(FORMATS)}, and these with {', '.join(PACKED)}); name it, as in dataset.format=jsonl or "
            f"dataset.format=text")  # fmt: skip


def _missing(name: str, path: Path) -> str:
    if glob.has_magic(name):
        return f"dataset.path={name}: no file matches; correct the pattern"
    folder = path.parent
    if not folder.is_dir():
        return f"dataset.path={name}: there is no folder {folder.absolute()}; correct the path"
    beside = sorted(each.name for each in folder.iterdir() if each.is_file())
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    there = [each for each in beside if format_of(Path(each))][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "correct the path"
    hint += f"; there are {', '.join(there)}" if there and not near else ""
    return f"dataset.path={name}: no such file in {folder.absolute()}; {hint}"
