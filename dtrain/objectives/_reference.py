"""The log-probabilities of documents by the model that training started from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
import xxhash
from safetensors.numpy import load_file, save_file
from torch import nn

from dtrain.data.batch import Batch
from dtrain.data.store import AbstractStore
from dtrain.data.streaming import Streams
from dtrain.errors import ConfigError, RunError
from dtrain.folders import whole_folder
from dtrain.objectives._documents import LEARNED, OTHER, REFERENCE, by_document, log_probs, part, with_about
from dtrain.objectives._preference import KL
from dtrain.objectives.base import Around, Before
from dtrain.objectives.replies import Reference

_FORMAT = 1
_SEEN_S, _SAY_EVERY_S, _MEET_EVERY = 30.0, 10.0, 64
_NAMES = ("train", "eval")


def reference(kind: Reference, around: Around, *, parts: Sequence[str] = ("",)) -> Before:
    """Fills in `REFERENCE` of each batch, and of those that travel with it under the further prefixes of `parts`: of
    the documents of a row, those of each part come in turn. Raises ConfigError, RunError. Collective.
    """
    if kind == "auto":
        without: Reference = "copy" if isinstance(around.rows[0], Streams) else "cached"
        kind = without if around.base is None else "adapters"
    around.say(f"objective.reference={kind}")
    if kind == "adapters":
        if around.base is None:
            raise ConfigError("objective.reference=adapters: this tuning has none that could be switched off; use "
                              "objective.reference=cached or copy, or another tuning=")  # fmt: skip
        return _Scored(around.module, around.base, parts)
    if kind == "copy":
        return _Scored(around.copy(), contextlib.nullcontext, parts)
    return _Cached(_tables(around), parts)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Scored:
    """By a forward of each micro-batch."""

    module: nn.Module
    inside: Callable[[], contextlib.AbstractContextManager[None]]
    parts: Sequence[str]

    def __call__(self, batches: Sequence[Batch], *, held_out: bool) -> Sequence[Batch]:
        found = []
        for batch in batches:
            with self.inside(), looking(self.module):
                values = {p + REFERENCE: log_probs(self.module, part(batch, p)) for p in self.parts}
            found.append(with_about(batch, values))
        return found


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Divergence:
    """Fills in `KL`: the mean over the second documents of a global batch of what the model gives them beyond the
    reference; 0 where that is less.
    """

    around: Around
    before: Before

    def __call__(self, batches: Sequence[Batch], *, held_out: bool) -> Sequence[Batch]:
        batches = self.before(batches, held_out=held_out)
        gained = []
        with looking(self.around.module):
            for batch in batches:
                other = part(batch, OTHER)
                gained.append(log_probs(self.around.module, other) - other.about[REFERENCE])
        total, num = self.around.comm.sum([float(torch.cat(gained).double().sum()), sum(map(len, gained))])
        kl = torch.tensor(max(0.0, total / max(1.0, num)), dtype=torch.float32, device=gained[0].device)
        return [with_about(batch, {KL: kl}) for batch in batches]


@contextlib.contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout."""
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was)


@dataclasses.dataclass(frozen=True, slots=True)
class _Table:
    starts: np.ndarray
    """Of each row's values; one more for the end."""
    values: np.ndarray

    def row(self, i: int) -> np.ndarray:
        return self.values[self.starts[i] : self.starts[i + 1]]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Cached:
    tables: Sequence[_Table]
    """Of the rows to train on, and of those that are held out."""
    parts: Sequence[str]

    def __call__(self, batches: Sequence[Batch], *, held_out: bool) -> Sequence[Batch]:
        table, num = self.tables[held_out], len(self.parts)
        found = []
        for batch in batches:
            rows = [table.row(i) for i in batch.sample_ids]
            each = [np.concatenate([_NONE, *(row[k::num] for row in rows)]) for k in range(num)]
            device = batch.about[LEARNED].device
            found.append(with_about(batch, {prefix + REFERENCE: torch.from_numpy(values).to(device)
                                       for prefix, values in zip(self.parts, each, strict=True)}))  # fmt: skip
        return found


_NONE = np.empty(0, np.float32)


def _tables(around: Around) -> list[_Table]:
    """Of all rows, found where an earlier start has kept them, else computed. Raises ConfigError, RunError.
    Collective.
    """
    comm, (train_rows, held_out) = around.comm, around.rows
    if isinstance(train_rows, Streams):
        raise ConfigError("objective.reference=cached: with dataset.streaming=true there are no rows yet that the "
                          "starting weights could be asked for; use objective.reference=copy, or adapters where the "
                          "tuning has them")  # fmt: skip
    stores = (train_rows, held_out)
    key = comm.gather(_key(around, stores) if comm.rank == 0 else "")[0]
    final_folder = around.cache / f"reference-{key}"
    there = comm.gather(str(int(final_folder.is_dir())))[0] == "1"
    if there:
        around.say(f"reference: reusing {final_folder}")
    elif around.resumed:
        raise RunError(f"objective.reference=cached: {final_folder} is not there. It has the log-probabilities of the "
                       f"weights that training started from, which those of a checkpoint cannot give; bring it back, "
                       f"or go on with objective.reference=copy 'resume.allow=[objective.reference]', which reads the "
                       f"starting weights again")  # fmt: skip
    else:
        _make(around, stores, final_folder)
    _wait_for(final_folder)
    return [_Table(**load_file(final_folder / f"{name}.safetensors")) for name in _NAMES]


def _key(around: Around, stores: Sequence[AbstractStore]) -> str:
    """Of the rows and of what the model says of them."""
    files = xxhash.xxh3_128()
    for store in stores:
        for source in store.sources.values():
            with source.path.open("rb") as file:
                while piece := file.read(1 << 24):
                    files.update(piece)
    return xxhash.xxh3_128_hexdigest(json.dumps([_FORMAT, around.start(), files.hexdigest()]).encode())[:16]


def _wait_for(path: Path) -> None:
    """What another rank has made."""
    deadline = time.monotonic() + _SEEN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(f"run.cache: {path}, which another rank has made, is not seen; run.cache must be on a file "
                           f"system that all nodes share")  # fmt: skip
        time.sleep(0.2)


def _make(around: Around, stores: Sequence[AbstractStore], final_folder: Path) -> None:
    """Every rank looks at a share of the rows; rank 0 puts together what they found. Collective."""
    comm, began = around.comm, time.monotonic()
    num = sum(map(len, stores))
    around.say(f"reference: the starting weights are asked for {num:,} rows, once, into {final_folder}")
    with contextlib.ExitStack() as stack:
        mine = str(stack.enter_context(whole_folder(final_folder))) if comm.rank == 0 else ""
        folder = Path(comm.gather(mine)[0])
        _wait_for(folder)
        for name, store in zip(_NAMES, stores, strict=True):
            save_file(_share(around, store, name), folder / f"{name}-{comm.rank}.safetensors")
        comm.barrier()
        if comm.rank == 0:
            for name, store in zip(_NAMES, stores, strict=True):
                _put_together(folder, name, len(store), comm.size)
    comm.barrier()
    around.say(f"reference: done in {time.monotonic() - began:.0f} s")


def _share(around: Around, store: AbstractStore, name: str) -> dict[str, np.ndarray]:
    """What this rank looks at: `ids` of rows, how many documents each has (`nums`), and their `values` one after the
    other.
    """
    comm, size = around.comm, around.batch.micro_batch
    order = np.argsort(-store.lengths, kind="stable")  # those of like length together
    chunks = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    num_rounds = -(-len(chunks) // comm.size)
    ids: list[int] = []
    nums: list[int] = []
    values: list[np.ndarray] = []
    told = time.monotonic()
    with looking(around.module):
        for i in range(num_rounds):
            at = i * comm.size + comm.rank
            chunk = chunks[at] if at < len(chunks) else []
            around.at(chunk)
            rows = [store.row(one) for one in chunk]
            batch = by_document(rows, chunk, around.pad_id).to(comm.device)
            values.append(log_probs(around.module, batch).cpu().numpy())
            ids += chunk
            nums += [len(row.lengths) for row in rows]
            if time.monotonic() - told > _SAY_EVERY_S:
                told = time.monotonic()
                around.say(f"reference: {i + 1:,} of {num_rounds:,} {name} micro-batches on each rank")
            if i % _MEET_EVERY == _MEET_EVERY - 1:  # so that no wait at the end is longer than the group's timeout
                comm.barrier()
    return {
        "ids": np.array(ids, np.int64),
        "nums": np.array(nums, np.int64),
        "values": np.concatenate([_NONE, *values]),
    }


def _put_together(folder: Path, name: str, num_rows: int, size: int) -> None:
    """The shares of all ranks, in the order of rows."""
    counts = np.zeros(num_rows + 1, np.int64)
    shares = []
    for rank in range(size):
        path = folder / f"{name}-{rank}.safetensors"
        _wait_for(path)
        shares.append(load_file(path))
        path.unlink()
        counts[shares[-1]["ids"] + 1] = shares[-1]["nums"]
    starts = np.cumsum(counts)
    values = np.empty(int(starts[-1]), np.float32)
    for share in shares:
        ends = np.cumsum(share["nums"])
        for i, end, num in zip(share["ids"].tolist(), ends.tolist(), share["nums"].tolist(), strict=True):
            values[starts[i] : starts[i] + num] = share["values"][end - num : end]
    save_file({"starts": starts, "values": values}, folder / f"{name}.safetensors")
