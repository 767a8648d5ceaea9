"""Where the samples of a step go, and what they come to: for all ranks, and without torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtrain.data.order import AbstractOrder
from dtrain.data.store import AbstractStore
from dtrain.plan.batch import BatchPlan

Ints = NDArray[np.int64]


def placed(store: AbstractStore, batch: BatchPlan, ids: Ints) -> Ints:
    """The samples of a global batch at their places in it: as they come, or where they differ in length the longest
    first, dealt out so that what the ranks compute at the same time is of like length.
    """
    if store.packed:
        return ids
    here = np.empty_like(ids)
    here[_dealt(batch)] = ids[np.argsort(-store.lengths[ids], kind="stable")]
    return here


@lru_cache(maxsize=4)
def _dealt(batch: BatchPlan) -> Ints:
    """The places of a global batch: those of all ranks' first micro-batches, of all ranks' second ones, and so on."""
    layers = zip(*(batch.micros(rank) for rank in range(batch.size)), strict=True)
    return np.array([place for layer in layers for places in layer for place in places], np.int64)


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
        here = lengths[placed(store, batch, each)]
        micros = [places for rank in range(batch.size) for places in batch.micros(rank) if places]
        width += sum(int(here[places.start : places.stop].max()) * len(places) for places in micros)
    return 1 - int(lengths[ids].sum(dtype=np.int64)) / width
