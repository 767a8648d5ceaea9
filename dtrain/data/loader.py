"""The micro-batches of one rank, by arithmetic: there is no state to save but the number of samples consumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import final

from dtrain.data.batch import Batch
from dtrain.data.collate import collate
from dtrain.data.order import samples_at
from dtrain.data.store import RowStore
from dtrain.plan.batch import BatchPlan


@final
class Loader:
    """Training batches. Any place can be asked for, in any order, and gives the same batches each time."""

    def __init__(self, store: RowStore, batch: BatchPlan, *, rank: int, seed: int, pad_id: int) -> None:
        assert len(store) > 0, store.path
        self._store = store
        self._batch = batch
        self._rank = rank
        self._seed = seed
        self._pad_id = pad_id

    def window(self, samples: int) -> list[Batch]:
        """The micro-batches of this rank in the optimizer step that comes after so many samples: as many as on every
        other rank.
        """
        ids = samples_at(self._seed, samples, self._batch.global_batch, len(self._store)).tolist()
        return _window(self._store, self._batch, ids, rank=self._rank, pad_id=self._pad_id)

    def epoch(self, samples: int) -> float:
        """Passes over the rows that so many samples are."""
        return samples / len(self._store)


def eval_windows(
    store: RowStore, batch: BatchPlan, *, rank: int, pad_id: int, max_rows: int | None = None
) -> Iterator[list[Batch]]:
    """The first `max_rows` rows, or all, each exactly once over all ranks, a global batch at a time.

    Every rank gets the same number of windows, and in each the same number of micro-batches; the last may be smaller.
    """
    num_rows = len(store) if max_rows is None else min(len(store), max_rows)
    for first in range(0, num_rows, batch.global_batch):
        ids = range(first, min(first + batch.global_batch, num_rows))
        yield _window(store, dataclasses.replace(batch, global_batch=len(ids)), ids, rank=rank, pad_id=pad_id)


def _window(store: RowStore, batch: BatchPlan, ids: Sequence[int], *, rank: int, pad_id: int) -> list[Batch]:
    """`ids` is a whole global batch."""
    mine = [[ids[place] for place in places] for places in batch.micros(rank)]
    return [collate([store.row(i) for i in each], each, pad_id) for each in mine]
