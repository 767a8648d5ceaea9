"""One row as the model sees it. A packed row holds several documents and is one sample."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """`tokens` [T] int32; `targets` [T] bool: whether this token is learned (the loss predicts it from those before).

    The first token of a document is never a target. `lengths`: tokens of each document in the row, in order. `labels`:
    of each example in the row, in order, a number that the objective knows the meaning of; empty where it has none.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    labels: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_targets(self) -> int:
        return int(self.targets.sum())
