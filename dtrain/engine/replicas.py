"""Whether ranks that hold the same values still do. A device or a memory that errs changes a bit and says nothing: from
then on one rank trains another model than the rest, and every loss still looks right (arXiv 2407.21783, 3.3.4, counts
such errors in a long run).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, final

import torch
import xxhash

from dtrain.checkpoint.storage import WEIGHT
from dtrain.errors import DivergedError
from dtrain.runs.host import host_name

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.strategies.base import AbstractStrategy, Shard

_SHOWN = 4
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Prints = dict[str, int]


@final
class Replicas:
    """Made when the strategy has its values. Compared is what ranks own, weights and the optimizer's state, and what is
    not trained, each among the ranks with the very same ranges of it. Collective.
    """

    def __init__(self, strategy: AbstractStrategy, comm: AbstractComm) -> None:
        self._strategy, self._comm = strategy, comm
        mine = [_digest((one.name, one.start, one.views[WEIGHT].numel()) for one in part) for part in self._parts()]
        self._groups = [_alike(each) for each in zip(*map(json.loads, comm.gather(json.dumps(mine))), strict=True)]
        """Of each part, the ranks that hold the same of it."""

    def _parts(self) -> Iterator[Iterator[Shard]]:
        yield self._strategy.shards()
        yield self._strategy.frozen_shards()

    def check(self, step: int) -> None:
        """Raises DivergedError on every rank, with the parameters and the ranks. Collective."""
        if not any(self._groups):
            return
        rank = self._comm.rank
        mine = [_prints(part) if any(rank in ranks for ranks in groups) else {}
                for part, groups in zip(self._parts(), self._groups, strict=True)]  # fmt: skip
        said = [
            json.loads(text) for text in self._comm.gather(json.dumps([_digest(sorted(one.items())) for one in mine]))
        ]
        bad = [[ranks for ranks in groups if len({said[one][i] for one in ranks}) > 1]
               for i, groups in enumerate(self._groups)]  # fmt: skip
        if any(bad):
            raise DivergedError(f"step {step}: {self._blame(mine, bad)}")

    def _blame(self, mine: list[Prints], bad: list[list[list[int]]]) -> str:
        """Collective."""
        asked = [any(self._comm.rank in ranks for ranks in groups) for groups in bad]
        told = json.dumps([host_name(), [one if wanted else {} for one, wanted in zip(mine, asked, strict=True)]])
        said = [json.loads(text) for text in self._comm.gather(told)]
        names: dict[str, None] = {}
        odd: set[int] = set()
        for i, groups in enumerate(bad):
            for ranks in groups:
                for name in said[ranks[0]][1][i]:
                    found = {rank: said[rank][1][i].get(name) for rank in ranks}
                    if len(set(found.values())) > 1:
                        names[name] = None
                        (usual, times), *_ = Counter(found.values()).most_common()
                        odd |= {rank for rank, one in found.items() if one != usual or times * 2 <= len(ranks)}
        shown = ", ".join(list(names)[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        where = ", ".join(f"rank {rank} on {said[rank][0]}" for rank in sorted(odd)[:_SHOWN])
        return (
            f"ranks that are to hold the same values do not: {shown}, on {where}. A device or a memory has erred "
            f"there, unless devices of different kinds train together. Nothing was saved since, and the "
            f"same command goes on from the last save: leave that machine out, or set train.compare_every=0"
        )


def _prints(shards: Iterable[Shard]) -> Prints:
    return {shard.name if state == WEIGHT else f"{shard.name} ({state})": _print_of(view)
            for shard in shards for state, view in shard.views.items()}  # fmt: skip


def _print_of(view: torch.Tensor) -> int:
    """Of the bits of a 1-D tensor: on CPU a digest, elsewhere their sum as whole numbers, which one that is another
    changes and no order of summing.
    """
    bits = view.detach().view(_BITS[view.element_size()])
    if bits.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(bits.contiguous().numpy().data)
    return int(bits.sum(dtype=torch.int64))


def _digest(values: Iterable[object]) -> str:
    return hashlib.blake2b(json.dumps(list(values)).encode(), digest_size=12).hexdigest()


def _alike(said: Iterable[str]) -> list[list[int]]:
    """Ranks that say the same, where there are several."""
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(said):
        ranks.setdefault(one, []).append(rank)
    return [each for each in ranks.values() if len(each) > 1]
