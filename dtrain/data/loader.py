"""The micro-batches of one rank. Of rows on disk, by arithmetic: there is no state to save but the number of samples
consumed; of streams, see `data.streaming`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from dtrain.data.batch import Batch
from dtrain.data.collate import collate
from dtrain.data.places import consumed, placed
from dtrain.data.rows import Row
from dtrain.data.store import AbstractStore
from dtrain.data.streaming import Collate as Collate
from dtrain.data.streaming import StreamLoader, Streams
from dtrain.plan.batch import BatchPlan

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm

Ints = NDArray[np.int64]


class AbstractLoader(Protocol):
    """Training batches of one rank."""

    line: str
    """What is to be told of it at its start; empty where there is nothing."""

    def window(self, samples: int) -> list[Batch]: ...

    def epoch(self, samples: int) -> float: ...

    def consumed(self, samples: int) -> dict[str, dict[str, int]]:
        """Of each source, what is known to have been taken of it by the first so many samples."""
        ...

    def state(self, samples: int) -> dict[str, Any] | None:
        """What a loader that goes on after so many samples, those of this step or of the next, has to be told: the part
        that is the same on all ranks.
        """
        ...

    def blobs(self, samples: int) -> dict[str, bytes]:
        """And the part that each rank has its own of."""
        ...

    def gathered(self, samples: int, comm: AbstractComm) -> dict[str, Any] | None:
        """Both, of all ranks. Collective."""
        ...

    def close(self) -> None: ...


def load(  # noqa: PLR0913 - all that batches depend on
    rows: AbstractStore | Streams, batch: BatchPlan, *, rank: int, seed: int, pad_id: int, collate: Collate,
    samples: int, state: Mapping[str, Any] | None, alive: Callable[[], None],
) -> AbstractLoader:  # fmt: skip
    """`samples`: those of the run before; `state`: what was `gathered` of them. `alive` is called now and then while a
    step waits for data that keeps coming. Raises DataError.
    """
    if isinstance(rows, Streams):
        return StreamLoader(rows, batch, rank=rank, pad_id=pad_id, collate=collate, samples=samples, state=state,
                            alive=alive)  # fmt: skip
    return Loader(rows, batch, rank=rank, seed=seed, pad_id=pad_id, collate=collate)


@final
class Loader:
    """Training batches. Any place can be asked for, in any order, and gives the same batches each time; the step that
    comes next is made while the last one is computed.
    """

    line = ""

    def __init__(self, store: AbstractStore, batch: BatchPlan, *, rank: int, seed: int, pad_id: int,
                 collate: Collate = collate) -> None:  # fmt: skip
        assert len(store) > 0, "no rows to train on"
        self._store = store
        self._order = store.order(seed)
        self._batch = batch
        self._rank = rank
        self._pad_id = pad_id
        self._collate = collate
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

    def state(self, samples: int) -> None:
        """The number of samples says it all."""

    def blobs(self, samples: int) -> dict[str, bytes]:
        return {}

    def gathered(self, samples: int, comm: AbstractComm) -> None: ...

    def close(self) -> None:
        """End the thread, once what it is at is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, samples: int) -> list[Batch]:
        ids = self._order.ids(samples, self._batch.global_batch)
        rows = _window(self._store, self._batch, ids, rank=self._rank)
        return [self._collate(each, mine, self._pad_id) for each, mine in rows]


def eval_windows(
    store: AbstractStore, batch: BatchPlan, *, rank: int, pad_id: int, max_rows: int | None = None,
    collate: Collate = collate,
) -> Iterator[list[Batch]]:  # fmt: skip
    """The first `max_rows` rows, or all, each exactly once over all ranks, a global batch at a time.

    Every rank gets the same number of windows, and in each the same number of micro-batches; the last may be smaller.
    """
    rows = store.first(len(store) if max_rows is None else max_rows)
    for start in range(0, len(rows), batch.global_batch):
        ids = rows[start : start + batch.global_batch]
        window = _window(store, dataclasses.replace(batch, global_batch=len(ids)), ids, rank=rank)
        yield [collate(each, mine, pad_id) for each, mine in window]


def _window(store: AbstractStore, batch: BatchPlan, ids: Ints, *, rank: int) -> Iterator[tuple[list[Row], list[int]]]:
    """The rows of each micro-batch of this rank, and their ids; `ids` is a whole global batch."""
    places = placed(store, batch, ids).tolist()
    for each in batch.micros(rank):
        mine = places[each.start : each.stop]
        yield [store.row(i) for i in mine], mine
