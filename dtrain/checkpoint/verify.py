"""Whether a checkpoint is what was written. No torch here."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, Manifest, step_of
from dtrain.errors import CheckpointError

CHUNK_BYTES = 1 << 20
"""As much as a core's own cache holds, so that what was read is not fetched from memory again for its digest."""


def committed(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first by the step in their names, whatever clocks say. Unchecked.

    Raises CheckpointError where there is something at `root` that cannot be listed: none is not what that means.
    """
    try:
        children = list(root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed ({error.strerror})") from None
    found = [(step, path) for path in children if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def size_problems(folder: Path, of: Manifest) -> list[str]:
    """Files that are missing, too short, too long, or no part of the checkpoint. Reads no content."""
    return [*_size_problems(folder, of).values(), *_foreign(folder, of)]


def _size_problems(folder: Path, of: Manifest) -> dict[str, str]:
    """By file."""
    return {name: problem for name, file in of.files.items() if (problem := _size_problem(folder / name, file))}


def _foreign(folder: Path, of: Manifest) -> list[str]:
    known = {*of.files, manifest.NAME}
    try:
        foreign = sorted(path for path in folder.iterdir() if path.name not in known)
    except OSError as error:
        return [f"{folder}: cannot be listed ({error.strerror})"]
    return [f"{path}: no file of this checkpoint" for path in foreign]


def _size_problem(path: Path, file: File) -> str | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return f"{path}: {'a link' if stat.S_ISLNK(found.st_mode) else 'something else'}, not a file"
    if found.st_size != file.bytes:
        return f"{path}: has {found.st_size:,} bytes instead of {file.bytes:,}"
    return None


def digest_problems(
    folder: Path, files: Iterable[tuple[str, File]], took: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """Files whose content differs from what was written. Reads all of them; `took` hears of each piece, and what it
    raises ends that.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda item: _digest_problem(folder / item[0], item[1], took), files)
        return [problem for problem in found if problem]


def problems(folder: Path) -> list[str]:
    """All that is wrong with the checkpoint in `folder`, each with its file; none where it is whole."""
    try:
        read = manifest.read(folder)
    except CheckpointError as error:
        return [str(error)]
    by_size = _size_problems(folder, read)
    found = [*_step_problem(folder, read), *by_size.values(), *_foreign(folder, read)]
    return found + digest_problems(folder, [item for item in read.files.items() if item[0] not in by_size])


def quick_problems(folder: Path) -> list[str]:
    """As `problems`, but of the manifest and the sizes alone."""
    try:
        read = manifest.read(folder)
    except CheckpointError as error:
        return [str(error)]
    return [*_step_problem(folder, read), *size_problems(folder, read)]


def _step_problem(folder: Path, read: Manifest) -> list[str]:
    step = step_of(folder)
    return [f"{folder / manifest.NAME}: of step {read.step}, in a folder of another one"] if step not in (
        None, read.step) else []  # fmt: skip


def _digest_problem(path: Path, file: File, took: Callable[[int], None]) -> str | None:
    digest = Digest()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                digest.take(digest.end, buffer[:count])
                took(count)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return digest.problem(path, file)


@final
class Digest:
    """Of a file, piece by piece from its front."""

    def __init__(self) -> None:
        import xxhash

        self._state = xxhash.xxh3_64()
        self.end = 0
        """How far it has come, in bytes."""

    def take(self, at: int, piece: memoryview) -> None:
        """What the file has from byte `at` on, which is not beyond `end`; what was taken before is not taken again."""
        assert at <= self.end, (at, self.end)
        new = piece[self.end - at :]
        self._state.update(new)
        self.end += len(new)

    def problem(self, path: Path, file: File) -> str | None:
        """What is wrong with the file at `path`, all of which was taken."""
        found = self._state.hexdigest()
        return None if found == file.xxh3 else (
            f"{path}: its content differs from what was written (xxh3 is {found}, not {file.xxh3})")  # fmt: skip
