"""From a checkpoint's files to live shards, which are read once: what fills the shards is proven on the way, and where
it is not what was written, all ranks fill them again from the checkpoint before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, Manifest, Parameter
from dtrain.checkpoint.storage import Reader
from dtrain.checkpoint.verify import digest_problems
from dtrain.errors import CheckpointError

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.strategies.base import AbstractStrategy, Shard

T = TypeVar("T")
ROUND_S = 5.0
"""Ranks that read hear of each other so often."""


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
    mark: Callable[[], None] = lambda: None,
) -> Restored:
    """Bring the strategy, which is wrapped, to the first of the candidates whose content is what was written.
    `parameters`: all that are trained. `wanted`: files of which what ranks keep for themselves is asked for, or a
    CheckpointError. `note` hears what is passed over, `mark` every few seconds that any rank has got on. Collective.

    Raises CheckpointError with what is wrong with each where none is, and where the first that can be read is of
    another model or optimizer.
    """
    wrong: list[str] = []
    together = _Together(comm, mark)
    for folder in candidates:
        reader, found = _open(folder, comm, together)
        if reader is not None:
            with contextlib.closing(reader):
                if misfit := _misfit(reader, parameters):
                    raise CheckpointError("\n".join([*misfit, *_listed("before it, passed over:", wrong)]))
                kept, found = _filled(reader, strategy, wanted, comm, together)
            if not found:
                strategy.refresh()
                return Restored(reader.manifest, kept)
        wrong += found
        note(f"resume: passed over {folder}: {'; '.join(_first(found, 3))}")
    raise CheckpointError("\n".join(_listed(
        "no checkpoint is what was written; restore one, or remove them to start from the beginning:", wrong
    )))  # fmt: skip


@final
class _Together:
    """What may take one rank far longer than another, done by a thread of each while all ranks meet again and again.

    One wait for the slowest would have to be a long one, in which a rank that is gone is not told from one that reads.
    """

    def __init__(self, comm: AbstractComm, mark: Callable[[], None]) -> None:
        self._comm, self._mark = comm, mark
        self._num_bytes, self._heard_of = 0, 0.0
        self._over = False

    def took(self, num_bytes: int) -> None:
        """Hear of what was read, from any thread. Raises CheckpointError where nobody waits for it any more."""
        if self._over:
            raise CheckpointError("the ranks that read it have lost each other")
        self._num_bytes += num_bytes

    def do(self, what: Callable[[], T]) -> T:
        """What it comes to, once all ranks are done with theirs. Collective.

        A disk that gives none of them anything is not got on with: `mark` hears nothing.
        """
        with concurrent.futures.ThreadPoolExecutor(1, initializer=_as_this_thread, initargs=(self._comm,)) as pool:
            mine = pool.submit(what)
            try:
                while True:
                    concurrent.futures.wait([mine], timeout=ROUND_S)
                    num_busy, num_bytes = self._comm.sum([not mine.done(), self._num_bytes])
                    if not num_busy:
                        return mine.result()
                    if num_bytes > self._heard_of:
                        self._heard_of = num_bytes
                        self._mark()
            except BaseException:
                self._over = True
                raise


def _as_this_thread(comm: AbstractComm) -> None:
    """A thread begins with the first device of the machine."""
    if comm.device.type == "cuda":
        torch.cuda.set_device(comm.device)


def fill(reader: Reader, shards: Iterable[Shard]) -> None:
    """Read all states of this rank's shards. Raises CheckpointError; the shards then hold no values of any meaning, as
    where the reader has problems after it.
    """
    with torch.no_grad():
        for shard in shards:
            for state, view in shard.views.items():
                reader.read_into(shard.name, state, shard.start, view)


def _filled(reader: Reader, strategy: AbstractStrategy, wanted: Callable[[Manifest], Iterable[str]],
            comm: AbstractComm, together: _Together) -> tuple[dict[str, dict[str, bytes]], list[str]]:  # fmt: skip
    """What ranks kept for themselves, and all that is wrong, which all ranks hear. Collective."""
    try:
        files = list(wanted(reader.manifest))
    except CheckpointError as error:  # on all ranks
        return {}, [f"{reader.folder / manifest.NAME}: {error}"]
    strategy.restore(reader.manifest.counters)
    kept, mine = together.do(functools.partial(_read, reader, strategy.shards(), files))
    return kept, _all(mine, comm)


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


def _open(folder: Path, comm: AbstractComm, together: _Together) -> tuple[Reader | None, list[str]]:
    """The same on all ranks: a reader that proves this rank's share of the files, or what is wrong with the files."""
    reader, mine, problems = None, {}, []
    try:
        read = manifest.read(folder)
        mine = share(read.files, comm)
        reader = Reader(folder, read, prove=mine, took=together.took)
    except CheckpointError as error:
        problems = [str(error)]
    if not (found := _all(problems, comm)):
        return reader, []
    if reader is not None:
        reader.close()
    # A header that makes no sense is seldom what was written, and then the file is to be named for that.
    mine_wrong = together.do(functools.partial(digest_problems, folder, mine.items(), took=together.took))
    return None, _all(mine_wrong, comm) or found


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
