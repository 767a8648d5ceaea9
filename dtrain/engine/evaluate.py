"""The loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dtrain.comm import AbstractComm

if TYPE_CHECKING:
    from dtrain.data.batch import Batch
    from dtrain.engine.step import Objective
    from dtrain.objectives.base import Before
    from dtrain.strategies.base import AbstractStrategy


class Evaluated(NamedTuple):
    """Over all ranks."""

    loss: float
    """Mean over targets."""
    num_targets: int
    sums: Mapping[str, Sequence[float]]
    """Of the objective's extras, flattened."""


def evaluate(
    windows: Iterable[list[Batch]],
    strategy: AbstractStrategy,
    objective: Objective,
    comm: AbstractComm,
    *,
    stop: Callable[[], bool] = lambda: False,
    before: Before | None = None,
) -> Evaluated | None:
    """What all ranks' rows come to; None where `stop`, asked after each window and the same on all ranks, ended it.
    `before` sees the micro-batches of each window first. Collective.

    Every rank runs the same number of forwards: idle ones are in the windows.
    """
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    num_targets, stopped = 0, False
    extras: dict[str, torch.Tensor] = {}
    strategy.module.eval()
    with torch.no_grad():
        for window in windows:
            batches: Sequence[Batch] = [batch.to(comm.device) for batch in window]
            for batch in batches if before is None else before(batches, held_out=True):
                loss = objective(strategy.module, batch)
                total += loss.total.double()
                num_targets += loss.num_targets
                for name, value in loss.extras.items():
                    extras[name] = extras.get(name, 0) + value.double().reshape(-1)
            if stop():
                stopped = True
                break
    strategy.module.train()
    if stopped:
        return None
    names = sorted(extras)
    loss_sum, targets, *values = comm.sum([float(total), num_targets, *(v for n in names for v in extras[n].tolist())])
    rest = iter(values)
    sums = {name: [next(rest) for _ in range(len(extras[name]))] for name in names}
    return Evaluated(loss_sum / max(1.0, targets), int(targets), sums)
