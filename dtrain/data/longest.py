"""Rows with the longest first, for a rehearsal: its first batch is the worst that there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

from dtrain.data.order import AbstractOrder, Shuffled, Taken
from dtrain.data.rows import Row
from dtrain.data.store import AbstractStore, RowStore

Ints = NDArray[np.int64]


@final
class LongestFirst(AbstractStore):
    """Another store's rows; only their order is not its own."""

    def __init__(self, store: AbstractStore) -> None:
        self._store, self.packed = store, store.packed

    @property
    def sources(self) -> Mapping[str, RowStore]:
        return self._store.sources

    def row(self, i: int) -> Row:
        return self._store.row(i)

    def first(self, num: int) -> Ints:
        return self._ids()[:num]

    def order(self, seed: int) -> AbstractOrder:
        return _Order(self._ids(), self._store.order(seed), len(self.sources))

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self._store.lengths

    def _ids(self) -> Ints:
        return np.argsort(-self._store.lengths.astype(np.int64), kind="stable")


@final
class _Order(AbstractOrder):
    """Again and again the same."""

    def __init__(self, ids: Ints, plain: AbstractOrder, num_sources: int) -> None:
        self._ids, self._plain, self._num_sources = ids, plain, num_sources
        self.num_samples = len(ids)

    def ids(self, first: int, count: int) -> Ints:
        found: Ints = self._ids[np.arange(first, first + count) % len(self._ids)]
        return found

    def before(self, place: int) -> Taken:
        return Taken((0,) * self._num_sources, self.ids(0, place))

    def source(self, k: int) -> Shuffled:
        return self._plain.source(k)
