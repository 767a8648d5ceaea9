"""One optimizer step. The only place that turns sums over targets into the mean over the global batch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dtrain.comm import AbstractComm
from dtrain.errors import LeapError, NonFiniteError

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.objectives.base import Before, Loss
    from dtrain.strategies.base import AbstractStrategy

Objective = Callable[["nn.Module", "Batch"], "Loss"]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """Over all ranks."""

    loss: float
    """Mean over targets."""
    grad_norm: float
    num_targets: int
    num_tokens: int
    skipped: bool
    extras: Mapping[str, float]
    """Of the objective, means over targets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """Of the loss of a step that is updated by."""

    most: float
    words: str
    """Why it is that, and what to do, for the error."""


def train_step(  # noqa: PLR0913 - it is all that a step is made of
               batches: Sequence[Batch], strategy: AbstractStrategy, objective: Objective, comm: AbstractComm,
               *, step: int, lr: float, before: Before | None = None,
               updating: Callable[[], None] = lambda: None, limit: Limit | None = None,
               term: Callable[[], tuple[str, torch.Tensor] | None] | None = None) -> StepResult:  # fmt: skip
    """Forward and backward over this rank's micro-batches, then one update. Collective. `step`: how many were done;
    `before` sees the micro-batches first; `updating` hears that the update begins; `term`, asked after the last
    forward, is what the tuning adds to the mean loss, the same on every rank, and is told besides it.

    Raises NonFiniteError on every rank, before the update, where the loss or a gradient is not a number, LeapError
    where the loss is above `limit`, and DivergedError where the ranks are not at the same step.
    """
    counts = [sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches)]
    num_targets, num_tokens = (int(n) for n in comm.sum(counts, step=step))
    if before is not None:
        batches = before([batch.to(comm.device) for batch in batches], held_out=False)
    losses, extras = [], []
    added: tuple[str, torch.Tensor] | None = None
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with strategy.micro(sync=last):
            loss = objective(strategy.module, batch.to(comm.device))
            # A sum over this rank's targets; the strategy's mean over ranks then is the mean over all targets.
            mean = loss.total * (comm.size / max(1, num_targets))
            if last and term is not None and (added := term()) is not None:
                mean = mean + added[1]
            strategy.backward(mean)
            losses.append(loss.total.detach())
            extras.append(loss.extras)
    # One wait for the device: the loss of each micro-batch, then the sum of each extra, in the order of its names.
    names = sorted(extras[0])
    further = [torch.stack([one[name].detach().float() for one in extras]).sum() for name in names]
    sums = torch.stack([*losses, *further]).tolist()
    sums, further_sums = sums[: len(losses)], sums[len(losses) :]
    total, *all_extras = comm.sum([sum(sums), *further_sums])
    if not math.isfinite(total):
        raise NonFiniteError(_blame("loss", batches, sums, comm))
    mean_loss = total / max(1, num_targets)
    if limit is not None and mean_loss > limit.most:
        highest = _highest(batches, sums, comm)
        raise LeapError(f"the loss is {mean_loss:.4f}, {limit.words}. Nothing was updated; {highest}")
    updating()
    update = strategy.step(lr)
    if not math.isfinite(update.grad_norm) and not update.skipped:
        raise NonFiniteError(_blame("gradient", batches, sums, comm))
    means = {name: value / max(1, num_targets) for name, value in zip(names, all_extras, strict=True)}
    if added is not None:
        means[added[0]] = float(added[1].detach())
    return StepResult(mean_loss, update.grad_norm, num_targets, num_tokens, update.skipped, means)


def _highest(batches: Sequence[Batch], sums: Sequence[float], comm: AbstractComm) -> str:
    """Which micro-batch has the highest loss. Collective."""
    mine = [(value / batch.num_targets, comm.rank, list(batch.sample_ids))
            for batch, value in zip(batches, sums, strict=True) if batch.num_targets]  # fmt: skip
    value, rank, ids = max(one for text in comm.gather(json.dumps(mine)) for one in json.loads(text))
    return f"the highest of a micro-batch is {value:.4f}, on rank {rank}, of rows {ids} of the prepared data"


def _blame(what: str, batches: Sequence[Batch], sums: Sequence[float], comm: AbstractComm) -> str:
    """Which rows it was: those of the micro-batches with such a loss, or all where only the gradient is. Collective."""
    bad = [b for b, value in zip(batches, sums, strict=True) if what == "gradient" or not math.isfinite(value)]
    said = comm.gather(json.dumps([list(b.sample_ids) for b in bad]))
    rows = [f"rank {rank}: rows {ids}" for rank, text in enumerate(said) if any(ids := json.loads(text))]
    return (f"the {what} is not finite; nothing was updated. {'; '.join(rows)} of the prepared data. Try a lower "
            f"optim.lr, a longer schedule.warmup_steps, or look at these rows")  # fmt: skip
