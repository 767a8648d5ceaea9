"""Which sample comes when: a pure function of the seed and the place, whatever the number of ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def index_at(seed: int, epoch: int, position: int, num_rows: int) -> int:
    """The sample at `position` of `epoch`, both from 0. Each epoch visits every sample once."""
    return int(_order(seed, epoch, num_rows)[position])


def samples_at(seed: int, first: int, count: int, num_rows: int) -> NDArray[np.int64]:
    """Samples `first` to `first + count` of the endless sequence of epochs."""
    assert num_rows > 0, "no rows to choose from"
    parts = [np.empty(0, np.int64)]
    while count > 0:
        epoch, position = divmod(first, num_rows)
        part = _order(seed, epoch, num_rows)[position : position + count]
        parts.append(part)
        first += len(part)
        count -= len(part)
    return np.concatenate(parts)


def global_batch_ids(seed: int, step: int, global_batch: int, num_rows: int) -> NDArray[np.int64]:
    """The samples of optimizer step `step`, from 0; a batch may end one epoch and begin the next."""
    return samples_at(seed, step * global_batch, global_batch, num_rows)


# Two: a batch may lie across epochs.
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    # Sorted by random keys rather than `Generator.permutation`: numpy promises that the bits of PCG64 stay the same
    # from version to version, and promises no such thing of what a Generator makes of them. A run resumed after an
    # upgrade would go on in another order, and nothing would show it.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
