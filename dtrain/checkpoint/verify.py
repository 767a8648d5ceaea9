"""Whether a checkpoint is what was written. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, Manifest, step_of
from dtrain.errors import CheckpointError

CHUNK_BYTES = 1 << 24


def committed(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first by the step in their names, whatever clocks say. Unchecked."""
    found = [(step, path) for path in _children(root) if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def size_problems(folder: Path, of: Manifest) -> list[str]:
    """Files that are missing, too short, too long, or no part of the checkpoint. Reads no content."""
    problems = []
    for name, file in of.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{path}: missing" if not path.is_symlink() else f"{path}: a link, not a file")
        elif path.stat().st_size != file.bytes:
            problems.append(f"{path}: has {path.stat().st_size:,} bytes instead of {file.bytes:,}")
    known = {*of.files, manifest.NAME}
    problems += [f"{path}: no file of this checkpoint" for path in _children(folder) if path.name not in known]
    return problems


def digest_problems(folder: Path, files: Iterable[tuple[str, File]]) -> list[str]:
    """Files whose content differs from what was written. Reads all of them."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda item: _digest_problem(folder / item[0], item[1]), files)
        return [problem for problem in found if problem]


def problems(folder: Path) -> list[str]:
    """All that is wrong with the checkpoint in `folder`, each with its file; none where it is whole."""
    try:
        read = manifest.read(folder)
    except CheckpointError as error:
        return [str(error)]
    found = [*_step_problem(folder, read), *size_problems(folder, read)]
    named = {problem.split(": ", 1)[0] for problem in found}
    return found + digest_problems(folder, [item for item in read.files.items() if str(folder / item[0]) not in named])


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


def _digest_problem(path: Path, file: File) -> str | None:
    import xxhash

    state = xxhash.xxh3_64()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                state.update(buffer[:count])
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if state.hexdigest() != file.xxh3:
        return f"{path}: its content differs from what was written (xxh3 is {state.hexdigest()}, not {file.xxh3})"
    return None


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
