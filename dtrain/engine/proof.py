"""What a run proves about its tuning: what is to be trained is, and what is to stay stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

import torch

from dtrain.checkpoint.storage import WEIGHT
from dtrain.errors import ModelError

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.strategies.base import AbstractStrategy, Shard

_SHOWN = 8
_CHUNK = 2**24
_PRIME = 65521


@final
class Proof:
    """Made when the strategy has its values, before the first step."""

    def __init__(self, strategy: AbstractStrategy, comm: AbstractComm, names: Sequence[str],
                 moves_first: Callable[[str], bool]) -> None:  # fmt: skip
        """`names`: of all trained parameters, on every rank the same."""
        self._strategy, self._comm, self._names, self._moves_first = strategy, comm, names, moves_first
        self._before = self._prints()

    def moved(self) -> None:
        """After the first update: its gradients, which the optimizer keeps the moments of, were numbers and, where the
        tuning says so, not all zero. Raises ModelError on every rank, with the names. Collective.
        """
        largest = dict.fromkeys(self._names, 0.0)
        for shard in self._strategy.shards():
            for state, view in shard.views.items():
                if state != WEIGHT and view.numel():
                    found = float(view.abs().max())
                    largest[shard.name] = max(largest[shard.name], found if math.isfinite(found) else math.inf)
        together = dict(zip(self._names, self._comm.max(list(largest.values())), strict=True))
        still = [name for name, value in together.items() if value == 0.0 and self._moves_first(name)]
        wild = [name for name, value in together.items() if value == math.inf]
        said = [f"{len(found)} of {len(self._names)} trained parameters {what}: {', '.join(found[:_SHOWN])}"
                f"{' and more' if len(found) > _SHOWN else ''}"
                for what, found in (("got no gradient in the first step", still),
                                    ("got a gradient that is not finite", wild)) if found]  # fmt: skip
        if said:
            raise ModelError(f"{'; '.join(said)}. They would not be learned: leave them out with tuning=freeze, or set "
                             f"train.unmoved=allow where that is meant")  # fmt: skip

    def kept(self) -> None:
        """At the end: every frozen parameter is what it was, to the last bit. Raises ModelError. Collective."""
        now = self._prints()
        changed = [name for name, value in now.items() if self._before.get(name) != value]
        if self._comm.max([float(len(changed))])[0]:
            raise ModelError(f"frozen parameters have changed while others were trained, on rank {self._comm.rank}: "
                             f"{', '.join(changed[:_SHOWN]) or 'none'}; what was saved does not go with the model that "
                             f"it started from")  # fmt: skip

    def _prints(self) -> dict[str, tuple[int, int]]:
        return {shard.name: _print_of(shard) for shard in self._strategy.frozen_shards()}


def _print_of(shard: Shard) -> tuple[int, int]:
    """Two sums over the bits of this rank's part, one of them by place: 64-bit integers that wrap around."""
    view = shard.views[WEIGHT].detach()
    bits = view.view(
        torch.int32 if view.element_size() == 4 else torch.int16 if view.element_size() == 2 else torch.int8
    )
    plain, placed = 0, 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device) % _PRIME + 1
        plain, placed = plain + int(part.sum()), placed + int((part * place).sum())
    return plain, placed
