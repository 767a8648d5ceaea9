"""From a checkpoint's files to live shards, which are read once: what fills the shards is proven on the way, and where
it is not what was written, all ranks fill them again from the checkpoint before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, Parameter
from dtrain.checkpoint.storage import Reader
from dtrain.checkpoint.verify import digest_problems
from dtrain.errors import CheckpointError

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.strategies.base import AbstractStrategy, Shard


def restore(
    candidates: Sequence[Path],
    strategy: AbstractStrategy,
    parameters: Mapping[str, Parameter],
    comm: AbstractComm,
    note: Callable[[str], None],
) -> Reader:
    """Bring the strategy, which is wrapped, to the first of the candidates whose content is what was written; its open
    reader. `parameters`: all that are trained. `note` hears what is passed over. Collective.

    Raises CheckpointError with what is wrong with each where none is, and where the first that can be read is of
    another model or optimizer.
    """
    wrong: list[str] = []
    for folder in candidates:
        reader, found = _open(folder, comm)
        if reader is not None:
            _check_fits(reader, parameters)
            strategy.restore(reader.manifest.counters)
            found = _all(fill(reader, strategy.shards()), comm)
            if not found:
                strategy.refresh()
                return reader
            reader.close()
        wrong += found
        note(f"resume: passed over {folder}: {'; '.join(found[:3])}")
    raise CheckpointError("\n".join(["no checkpoint is what was written; restore one, or remove them to start from the "
                                     "beginning:", *(f"  {one}" for one in wrong)]))  # fmt: skip


def fill(reader: Reader, shards: Iterable[Shard]) -> list[str]:
    """Read all states of this rank's shards, and what else there is in the files that it is to prove; what is wrong
    with them. Where something is, the shards hold no values of any meaning.
    """
    try:
        with torch.no_grad():
            for shard in shards:
                for state, view in shard.views.items():
                    reader.read_into(shard.name, state, shard.start, view)
    except CheckpointError as error:
        return [str(error)]
    return reader.problems()


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


def _check_fits(reader: Reader, parameters: Mapping[str, Parameter]) -> None:
    """Raises CheckpointError with every parameter that is not the checkpoint's."""
    there = reader.manifest.parameters
    wrong = [f"  {name}: of shape {there[name].shape if name in there else 'none'} in the checkpoint, {one.shape} here"
             for name, one in parameters.items() if name not in there or there[name].shape != one.shape]  # fmt: skip
    wrong += [f"  {name}: in the checkpoint, not in the model" for name in there if name not in parameters]
    if wrong:
        raise CheckpointError("\n".join([f"{reader.folder}: not of this model:", *_first(wrong)]))
    if reader.manifest.counters["updates"]:
        wrong = [f"  {name}: {state} is not in the checkpoint" for name, one in parameters.items()
                 for state in one.states if state not in there[name].states]  # fmt: skip
    if wrong:
        raise CheckpointError("\n".join([f"{reader.folder}: of another optimizer:", *_first(wrong)]))


def _first(wrong: list[str]) -> list[str]:
    more = [f"  and {len(wrong) - 8} more"] if len(wrong) > 8 else []
    return [*wrong[:8], *more]
