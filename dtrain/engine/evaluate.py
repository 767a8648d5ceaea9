"""The loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from dtrain.comm import AbstractComm

if TYPE_CHECKING:
    from dtrain.data.batch import Batch
    from dtrain.engine.step import Objective
    from dtrain.strategies.base import AbstractStrategy


def evaluate(
    windows: Iterable[list[Batch]],
    strategy: AbstractStrategy,
    objective: Objective,
    comm: AbstractComm,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """Mean loss over all targets of all ranks' rows, and how many there are; None where `stop`, asked after each window
    and the same on all ranks, ended it. Collective.

    Every rank runs the same number of forwards: idle ones are in the windows.
    """
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    num_targets, stopped = 0, False
    strategy.module.eval()
    with torch.no_grad():
        for window in windows:
            for batch in window:
                loss = objective(strategy.module, batch.to(comm.device))
                total += loss.total.double()
                num_targets += loss.num_targets
            if stop():
                stopped = True
                break
    strategy.module.train()
    if stopped:
        return None
    loss_sum, targets = comm.sum([float(total), num_targets])
    return loss_sum / max(1.0, targets), int(targets)
