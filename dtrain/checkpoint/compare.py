"""Two checkpoints, element by element, whichever strategies wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dtrain.checkpoint.storage import Reader

CHUNK = 1 << 20
"""Elements that are compared at a time."""


class Apart(NamedTuple):
    """One state of one parameter that is not bit-equal in both."""

    name: str
    state: str
    absolute: float
    """The largest difference of two elements; 0 where only signs of zeros differ."""
    relative: float
    """The same as a share of the largest element that there is: of an element near 0 a share of itself says nothing."""


def apart(a: Reader, b: Reader) -> Iterator[Apart]:
    """What differs of all that both hold in the same shape. Reads both whole, a little at a time."""
    for name, mine in a.manifest.parameters.items():
        other = b.manifest.parameters.get(name)
        if other is None or other.shape != mine.shape:
            continue
        for state in mine.states:
            if state in other.states and (found := _apart(a, b, name, state, math.prod(mine.shape))) is not None:
                yield Apart(name, state, *found)


def _apart(a: Reader, b: Reader, name: str, state: str, numel: int) -> tuple[float, float] | None:
    """Absolute and relative; None where all bits are the same."""
    same, absolute, largest = True, 0.0, 0.0
    for start in range(0, numel, CHUNK):
        x, y = (torch.empty(min(CHUNK, numel - start)) for _ in range(2))
        a.read_into(name, state, start, x)
        b.read_into(name, state, start, y)
        largest = max(largest, *(float(one.abs().nan_to_num(0.0, math.inf).max()) for one in (x, y)))
        alike = x.view(torch.int32) == y.view(torch.int32)
        if alike.all():
            continue
        same = False
        by = torch.where(alike, 0.0, (x.double() - y.double()).abs())  # what is no number may be the same in both
        found = float(by.max())
        absolute = found if math.isnan(found) or found > absolute else absolute  # what is no number is the largest
    return None if same else (absolute, absolute / largest if largest else absolute)
