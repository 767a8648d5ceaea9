"""The micro-batches of one rank, by arithmetic: there is no state to save but the number of samples consumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import final

import numpy as np
from numpy.typing import NDArray

from dtrain.data.batch import Batch
from dtrain.data.collate import collate
from dtrain.data.order import AbstractOrder
from dtrain.data.store import AbstractStore
from dtrain.plan.batch import BatchPlan

Ints = NDArray[np.int64]


@final
class Loader:
    """Training batches. Any place can be asked for, in any order, and gives the same batches each time; the step that
    comes next is made while the last one is computed.
    """

    def __init__(self, store: AbstractStore, batch: BatchPlan, *, rank: int, seed: int, pad_id: int) -> None:
        assert len(store) > 0, "no rows to train on"
        self._store = store
        self._order = store.order(seed)
        self._batch = batch
        self._rank = rank
        self._pad_id = pad_id
        self._thread = ThreadPoolExecutor(1, "loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def window(self, samples: int) -> list[Batch]:
        """The micro-batches of this rank in the optimizer step that comes after so many samples: as many as on every
        other rank.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == samples else self._make(samples)
        next_samples = samples + self._batch.global_batch
        self._ahead = next_samples, self._thread.submit(self._make, next_samples)
        return batches

    def epoch(self, samples: int) -> float:
        """Passes over the rows that so many samples are."""
        return samples / self._order.num_samples

    def consumed(self, samples: int) -> dict[str, dict[str, int]]:
        """Of each source, samples and tokens among the first so many samples."""
        return consumed(self._store, self._order, samples)

    def _make(self, samples: int) -> list[Batch]:
        ids = self._order.ids(samples, self._batch.global_batch)
        return _window(self._store, self._batch, ids, rank=self._rank, pad_id=self._pad_id)


def consumed(store: AbstractStore, order: AbstractOrder, samples: int) -> dict[str, dict[str, int]]:
    """Of each source, samples and tokens among the first `samples` of the order."""
    taken, start, found = order.before(samples), 0, {}
    for k, (name, source) in enumerate(store.sources.items()):
        size = len(source)
        mine = taken.further[(taken.further >= start) & (taken.further < start + size)] - start
        passes, rest = divmod(taken.counts[k], size)
        tokens = passes * int(source.lengths.sum(dtype=np.int64)) if passes else 0
        tokens += int(source.lengths[np.concatenate([order.source(k).ids(passes * size, rest), mine])].sum())
        found[name] = {"samples": taken.counts[k] + len(mine), "tokens": tokens}
        start += size
    return found


def padding(store: AbstractStore, order: AbstractOrder, batch: BatchPlan, *, steps: int) -> float:
    """Share of padding in what the ranks compute in the first so many steps."""
    width, lengths = 0, store.lengths
    ids = order.ids(0, steps * batch.global_batch).reshape(steps, -1)
    for each in ids:
        placed = lengths[_placed(store, batch, each)]
        micros = [places for rank in range(batch.size) for places in batch.micros(rank) if places]
        width += sum(int(placed[places.start : places.stop].max()) * len(places) for places in micros)
    return 1 - int(lengths[ids].sum(dtype=np.int64)) / width


def eval_windows(
    store: AbstractStore, batch: BatchPlan, *, rank: int, pad_id: int, max_rows: int | None = None
) -> Iterator[list[Batch]]:
    """The first `max_rows` rows, or all, each exactly once over all ranks, a global batch at a time.

    Every rank gets the same number of windows, and in each the same number of micro-batches; the last may be smaller.
    """
    rows = store.first(len(store) if max_rows is None else max_rows)
    for start in range(0, len(rows), batch.global_batch):
        ids = rows[start : start + batch.global_batch]
        yield _window(store, dataclasses.replace(batch, global_batch=len(ids)), ids, rank=rank, pad_id=pad_id)


def _window(store: AbstractStore, batch: BatchPlan, ids: Ints, *, rank: int, pad_id: int) -> list[Batch]:
    """`ids` is a whole global batch."""
    placed = _placed(store, batch, ids).tolist()
    mine = [placed[places.start : places.stop] for places in batch.micros(rank)]
    return [collate([store.row(i) for i in each], each, pad_id) for each in mine]


def _placed(store: AbstractStore, batch: BatchPlan, ids: Ints) -> Ints:
    """The samples of a global batch at their places in it: as they come, or where they differ in length the longest
    first, dealt out so that what the ranks compute at the same time is of like length.
    """
    if store.packed:
        return ids
    placed = np.empty_like(ids)
    placed[_dealt(batch)] = ids[np.argsort(-store.lengths[ids], kind="stable")]
    return placed


@lru_cache(maxsize=4)
def _dealt(batch: BatchPlan) -> Ints:
    """The places of a global batch: those of all ranks' first micro-batches, of all ranks' second ones, and so on."""
    layers = zip(*(batch.micros(rank) for rank in range(batch.size)), strict=True)
    return np.array([place for layer in layers for places in layer for place in places], np.int64)
