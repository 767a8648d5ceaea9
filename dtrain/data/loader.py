"""The micro-batches of one rank, by arithmetic: there is no state to save but the number of samples consumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

import numpy as np
from numpy.typing import NDArray

from dtrain.data.batch import Batch
from dtrain.data.collate import collate
from dtrain.data.places import consumed, placed
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
    places = placed(store, batch, ids).tolist()
    mine = [places[each.start : each.stop] for each in batch.micros(rank)]
    return [collate([store.row(i) for i in each], each, pad_id) for each in mine]
