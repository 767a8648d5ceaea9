"""From a checkpoint's files to live shards, which are read once: what fills the shards is proven on the way, and where
it is not what was written, all ranks fill them again from the checkpoint before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, Manifest, Parameter
from dtrain.checkpoint.storage import Reader
from dtrain.checkpoint.verify import digest_problems
from dtrain.errors import CheckpointError

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.strategies.base import AbstractStrategy, Shard


class Restored(NamedTuple):
    manifest: Manifest
    """Of the checkpoint that was taken."""
    kept: dict[str, dict[str, bytes]]
    """What ranks wrote besides their parts, of the files that were asked for."""


def restore(
    candidates: Sequence[Path],
    strategy: AbstractStrategy,
    parameters: Mapping[str, Parameter],
    wanted: Callable[[Manifest], Iterable[str]],
    comm: AbstractComm,
    note: Callable[[str], None],
) -> Restored:
    """Bring the strategy, which is wrapped, to the first of the candidates whose content is what was written.
    `parameters`: all that are trained. `wanted`: files of which what ranks keep for themselves is asked for. `note`
    hears what is passed over. Collective.

    Raises CheckpointError with what is wrong with each where none is, and where the first that can be read is of
    another model or optimizer.
    """
    wrong: list[str] = []
    for folder in candidates:
        reader, found = _open(folder, comm)
        if reader is not None:
            with contextlib.closing(reader):
                if misfit := _misfit(reader, parameters):
                    raise CheckpointError("\n".join([*misfit, *_listed("before it, passed over:", wrong)]))
                strategy.restore(reader.manifest.counters)
                kept, mine = _read(reader, strategy.shards(), wanted(reader.manifest))
                found = _all(mine, comm)
            if not found:
                strategy.refresh()
                return Restored(reader.manifest, kept)
        wrong += found
        note(f"resume: passed over {folder}: {'; '.join(_first(found, 3))}")
    raise CheckpointError("\n".join(_listed(
        "no checkpoint is what was written; restore one, or remove them to start from the beginning:", wrong
    )))  # fmt: skip


def fill(reader: Reader, shards: Iterable[Shard]) -> None:
    """Read all states of this rank's shards. Raises CheckpointError; the shards then hold no values of any meaning, as
    where the reader has problems after it.
    """
    with torch.no_grad():
        for shard in shards:
            for state, view in shard.views.items():
                reader.read_into(shard.name, state, shard.start, view)


def _read(
    reader: Reader, shards: Iterable[Shard], wanted: Iterable[str]
) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """All that this rank needs, and what else there is in the files that it is to prove: what ranks kept for
    themselves, and what is wrong.
    """
    try:
        fill(reader, shards)
        return {file: reader.blobs(file) for file in wanted}, reader.problems()
    except CheckpointError as error:
        return {}, [str(error)]


def share(files: Mapping[str, File], comm: AbstractComm) -> dict[str, File]:
    """Those that this rank proves: as far as it can be, those that hold what it needs."""
    return {name: file for i, (name, file) in enumerate(files.items()) if i * comm.size // len(files) == comm.rank}


def _open(folder: Path, comm: AbstractComm) -> tuple[Reader | None, list[str]]:
    """The same on all ranks: a reader that proves this rank's share of the files, or what is wrong with the files."""
    reader, mine, problems = None, {}, []
    try:
        read = manifest.read(folder)
        mine = share(read.files, comm)
        reader = Reader(folder, read, prove=mine)
    except CheckpointError as error:
        problems = [str(error)]
    if not (found := _all(problems, comm)):
        return reader, []
    if reader is not None:
        reader.close()
    # A header that makes no sense is seldom what was written, and then the file is to be named for that.
    return None, _all(digest_problems(folder, mine.items()), comm) or found


def _all(mine: list[str], comm: AbstractComm) -> list[str]:
    """What any rank says, once. Collective."""
    return list(dict.fromkeys(one for said in comm.gather(json.dumps(mine)) for one in json.loads(said)))


def _misfit(reader: Reader, parameters: Mapping[str, Parameter]) -> list[str]:
    """Every parameter that is not the checkpoint's, under a title; none where all are."""
    there = reader.manifest.parameters
    wrong = [f"{name}: of shape {there[name].shape if name in there else 'none'} in the checkpoint, {one.shape} here"
             for name, one in parameters.items() if name not in there or there[name].shape != one.shape]  # fmt: skip
    wrong += [f"{name}: in the checkpoint, not in the model" for name in there if name not in parameters]
    if wrong:
        return _listed(f"{reader.folder}: not of this model:", _first(wrong, 8))
    if reader.manifest.counters["updates"]:
        wrong = [f"{name}: {state} is not in the checkpoint" for name, one in parameters.items()
                 for state in one.states if state not in there[name].states]  # fmt: skip
    return _listed(f"{reader.folder}: of another optimizer:", _first(wrong, 8))


def _listed(title: str, lines: list[str]) -> list[str]:
    """None without lines."""
    return [title, *(f"  {one}" for one in lines)] if lines else []


def _first(lines: list[str], num: int) -> list[str]:
    return [*lines[:num], *([f"and {len(lines) - num} more"] if len(lines) > num else [])]
