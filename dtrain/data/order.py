"""Which sample comes when: a pure function of the seed and the place, whatever the number of ranks.

A place is counted from the first sample of the run, over all epochs. Any place can be asked for at any time, and what
has been consumed before it is known from the place alone.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import final

import numpy as np
from numpy.typing import NDArray

from dtrain.config.spec import OnDry

Ints = NDArray[np.int64]

_BLOCK = 1024
"""Places over which the sources of a mixture are spread exactly by their rates, and shuffled."""
_WINDOW = 2048
_GROUP = 32
"""Samples of like length that come one after the other, and the window out of which they are taken."""


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What came before a place."""

    counts: tuple[int, ...]
    """Of each source, the first so many samples of its own endless order."""
    further: Ints
    """Besides these: ids over all sources."""


class AbstractOrder(ABC):
    """An endless sequence of epochs."""

    num_samples: int
    """Of an epoch."""

    @abstractmethod
    def ids(self, first: int, count: int) -> Ints:
        """The samples at places `first` to `first + count`."""

    @abstractmethod
    def before(self, place: int) -> Taken:
        """What came before `place`."""

    @abstractmethod
    def source(self, k: int) -> Shuffled:
        """The order of source `k` alone, by its own ids."""


@final
class Shuffled(AbstractOrder):
    """Each epoch visits every sample once. Keeps 8 bytes a sample."""

    def __init__(self, seed: int, num_samples: int, *, stream: tuple[int, ...] = ()) -> None:
        """`stream`: numbers that make another order of the same seed; the last is not 0."""
        assert num_samples > 0, "no samples to choose from"
        self.num_samples = num_samples
        # Two: a batch may lie across epochs.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffled(num_samples, seed, epoch, *stream))

    def ids(self, first: int, count: int) -> Ints:
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, position = divmod(first, self.num_samples)
            part = self._epoch(epoch)[position : position + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def before(self, place: int) -> Taken:
        return Taken((place,), np.empty(0, np.int64))

    def source(self, k: int) -> Shuffled:
        assert k == 0, k
        return self


@final
class Mixed(AbstractOrder):
    """Samples of several sources, each in its own order, as many of each as its rate says.

    In a block of places each source has its exact share, to the sample, and the sources are shuffled among each other.
    An epoch ends where the first source has been seen whole (stop), or the last; one that is seen whole earlier starts
    again (repeat), or is left to the others to fill (drop). A source goes on in the next epoch where it was.
    """

    def __init__(self, seed: int, sizes: Sequence[int], rates: Sequence[float], on_dry: OnDry) -> None:
        """`sizes`: samples of each source; `rates`: samples of it for each of the mixture, up to a common factor."""
        assert len(sizes) == len(rates) > 0
        assert min(rates) > 0, rates
        self._seed, self._sizes, self._capped = seed, tuple(sizes), on_dry == "drop"
        self._sources = [Shuffled(seed, size, stream=(k, 2)) for k, size in enumerate(sizes)]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # Whole numbers, so that every machine counts alike. A tick is at most half a sample.
        total = sum(map(Fraction, rates))
        self._rates = [max(1, round(Fraction(rate) / total * 2**40)) for rate in rates]
        self._scale = 2**41
        self._end = self._last_tick(on_dry)
        self.counts = self._at(self._end)
        """Samples of each source in an epoch."""
        self.num_samples = sum(self.counts)
        self._labels = lru_cache(maxsize=2)(self._labels_of)

    def ids(self, first: int, count: int) -> Ints:
        sources, numbers = self.places(first, count)
        found = np.empty(count, np.int64)
        for k in np.unique(sources).tolist():
            mine = sources == k  # whose numbers follow each other
            found[mine] = self._sources[k].ids(int(numbers[mine][0]), int(mine.sum())) + self._offsets[k]
        return found

    def places(self, first: int, count: int) -> tuple[Ints, Ints]:
        """The sources at places `first` to `first + count`, and how many samples of it came before each."""
        sources, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while count > 0:
            epoch, position = divmod(first, self.num_samples)
            block, skip = divmod(position, _BLOCK)
            starts, labels = self._labels(epoch, block)
            part = labels[skip : skip + count]
            passed = np.bincount(labels[:skip], minlength=len(starts))
            found = np.empty(len(part), np.int64)
            for k in np.unique(part).tolist():
                mine = part == k
                found[mine] = starts[k] + int(passed[k]) + np.arange(int(mine.sum()))
            sources.append(part)
            numbers.append(found)
            first += len(part)
            count -= len(part)
        return np.concatenate(sources), np.concatenate(numbers)

    def before(self, place: int) -> Taken:
        epoch, position = divmod(place, self.num_samples)
        block, skip = divmod(position, _BLOCK)
        starts, labels = self._labels(epoch, block)
        passed = np.bincount(labels[:skip], minlength=len(starts)).tolist()
        return Taken(tuple(map(sum, zip(starts, passed, strict=True))), np.empty(0, np.int64))

    def source(self, k: int) -> Shuffled:
        return self._sources[k]

    def _labels_of(self, epoch: int, block: int) -> tuple[list[int], Ints]:
        """Of a block: how many samples of each source came before, and the source of each of its places."""
        first = block * _BLOCK
        before, after = (self._upto(place) for place in (first, min(first + _BLOCK, self.num_samples)))
        labels = np.repeat(np.arange(len(before)), np.subtract(after, before))
        labels = labels[shuffled(len(labels), self._seed, epoch, block, 3)]
        return [epoch * whole + num for whole, num in zip(self.counts, before, strict=True)], labels

    def _upto(self, place: int) -> list[int]:
        """Samples of each source among the first `place` of an epoch, blocks being whole."""
        low, high = 0, self._end  # the last tick at which there are at most `place`
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self._at(middle)) <= place:
                low = middle
            else:
                high = middle - 1
        counts, later = self._at(low), self._at(low + 1)
        left = place - sum(counts)
        for k, (now, then) in enumerate(zip(counts, later, strict=True)):  # those due at the same tick, in order
            more = min(left, then - now)
            counts[k] += more
            left -= more
        return counts

    def _at(self, tick: int) -> list[int]:
        """Samples of each source that are due by a tick."""
        due = [(2 * rate * tick + self._scale) // (2 * self._scale) for rate in self._rates]
        return [min(num, size) for num, size in zip(due, self._sizes, strict=True)] if self._capped else due

    def _last_tick(self, on_dry: OnDry) -> int:
        pairs = list(zip(self._sizes, self._rates, strict=True))
        if on_dry == "stop":  # before one more than all samples of a source would be due
            return min(-(-(2 * size + 1) * self._scale // (2 * rate)) - 1 for size, rate in pairs)
        return max(-(-(2 * size - 1) * self._scale // (2 * rate)) for size, rate in pairs)


@final
class Grouped(AbstractOrder):
    """Another order, with samples of like length beside each other: windows of it are sorted by length and cut into
    groups, and the groups are shuffled. Each epoch has the same samples as there.
    """

    def __init__(self, seed: int, order: AbstractOrder, lengths: NDArray[np.integer]) -> None:
        """`lengths`: of every sample."""
        self._seed, self._order, self._lengths = seed, order, lengths
        self.num_samples = order.num_samples
        self._window = lru_cache(maxsize=2)(self._window_of)

    def ids(self, first: int, count: int) -> Ints:
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, position = divmod(first, self.num_samples)
            window, skip = divmod(position, _WINDOW)
            part = self._window(epoch, window)[skip : skip + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def before(self, place: int) -> Taken:
        skip = place % self.num_samples % _WINDOW
        whole = self._order.before(place - skip)
        return Taken(whole.counts, np.concatenate([whole.further, self.ids(place - skip, skip)]))

    def source(self, k: int) -> Shuffled:
        return self._order.source(k)

    def _window_of(self, epoch: int, window: int) -> Ints:
        first = window * _WINDOW
        count = min(_WINDOW, self.num_samples - first)
        ids = self._order.ids(epoch * self.num_samples + first, count)
        ids = ids[np.argsort(self._lengths[ids], kind="stable")]
        groups = np.split(ids, range(_GROUP, count, _GROUP))
        # A last group that is not full stays last, so that the others begin where a batch may begin.
        num_full = count // _GROUP
        order = shuffled(num_full, self._seed, epoch, window, 1).tolist()
        return np.concatenate([groups[i] for i in [*order, *range(num_full, len(groups))]])


@lru_cache(maxsize=1)
def _plain(seed: int, num_rows: int) -> Shuffled:
    return Shuffled(seed, num_rows)


def global_batch_ids(seed: int, step: int, global_batch: int, num_rows: int) -> Ints:
    """The samples of optimizer step `step`, from 0, of one dataset; a batch may end one epoch and begin the next."""
    return _plain(seed, num_rows).ids(step * global_batch, global_batch)


def shuffled(num: int, *seed: int) -> Ints:
    """The numbers below `num` in an order that the numbers of `seed` decide; zeros at their end decide nothing."""
    # Sorted by random keys rather than `Generator.permutation`: numpy promises that the bits of PCG64 stay the same
    # from version to version, and promises no such thing of what a Generator makes of them. A run resumed after an
    # upgrade would go on in another order, and nothing would show it.
    keys = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(num)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def by_rate(sizes: Sequence[int], rates: Sequence[float]) -> Ints:
    """Ids over all sources, of all samples once, so that any beginning has of each source as its rate says."""
    times = [(np.arange(size) + 0.5) / rate for size, rate in zip(sizes, rates, strict=True)]
    return np.argsort(np.concatenate([np.empty(0), *times]), kind="stable")
