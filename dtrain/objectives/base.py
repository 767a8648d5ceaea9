"""What an objective returns, the loss of next-token prediction, and what an objective may ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.data.batch import Batch
    from dtrain.data.store import AbstractStore
    from dtrain.data.streaming import Streams
    from dtrain.plan.batch import BatchPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch: a SUM over its targets, so that any split of a batch adds up to the same."""

    total: torch.Tensor
    """fp32 scalar, attached to every trainable parameter even where there is no target."""
    num_targets: int
    extras: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Further sums over targets, for the trackers; the same names in every micro-batch of every rank. In training only
    scalars; in an eval of any shape, for the objective's `metrics`."""


def causal_loss(module: nn.Module, batch: Batch) -> Loss:
    """Next-token prediction, by a module that gives the sum of its cross-entropy over targets."""
    return Loss(total=module(**batch.inputs), num_targets=batch.num_targets)


class Before(Protocol):
    def __call__(self, batches: Sequence[Batch], *, held_out: bool) -> Sequence[Batch]:
        """The micro-batches of this rank in a global batch, on the device, with more in `about`: what no micro-batch
        knows of itself. `held_out`: whether they are of the held-out rows. Collective.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What is there when training begins."""

    module: nn.Module
    """The strategy's: every rank has to call it as often as the others."""
    comm: AbstractComm
    base: Callable[[], AbstractContextManager[None]] | None
    """Inside it the module is what it was before tuning; None where tuning changes the model's own weights."""
    copy: Callable[[], nn.Module]
    """A further model with the weights that training started from, whole on each rank, to be looked at only."""
    rows: tuple[AbstractStore | Streams, AbstractStore]
    batch: BatchPlan
    pad_id: int
    assets: Path
    """The model's config and tokenizer."""
    start: Callable[[], str]
    """A digest of all that decides what the model says before the first step."""
    cache: Path
    """Where what takes long may be kept, for later starts too."""
    resumed: bool
    """Whether the module's weights are not those that training started from."""
    say: Callable[[str], None]
    at: Callable[[Sequence[int]], None]
    """To be told which rows are looked at, so that a rank that is slow is not taken for one that hangs."""
