"""The seam: what a parallel strategy does for the engine, and nothing else."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.config.spec import OptimSpec
    from dtrain.models.base import AbstractAlongside, ModelBundle

Precision = Literal["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True, slots=True)
class Optim:
    """What the update is, settled by the plan; every strategy gives it the same meaning."""

    spec: OptimSpec
    precision: Precision
    """Of forward and backward. Masters, gradient sums over micro-batches and ranks, and optimizer state are fp32."""
    grad_clip: float
    """Largest global gradient norm; 0 is off."""
    lr_factor: Callable[[str], float] = lambda name: 1.0
    """Of a parameter by its name: what the learning rate of a step is multiplied by for it."""

    alongside: AbstractAlongside | None = None
    """What is done besides while the weights are trained."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        optimizer = self.spec.build(named, self.lr_factor)
        if self.alongside is not None:
            self.alongside.watch(optimizer)
        return optimizer

    @property
    def state_names(self) -> tuple[str, ...]:
        """The tensors that are kept of every parameter beside its weight."""
        return (*self.spec.state_names, *(self.alongside.state_names if self.alongside is not None else ()))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """What this rank owns of one parameter: a contiguous flat range of it, as live fp32 views."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the range, in the flattened parameter."""
    views: Mapping[str, torch.Tensor]
    """1-D: `weight`, and each optimizer state by its name once it exists. Filling a view changes the training state, by
    the time the next shard is asked for at the latest."""
    replica: int = 0
    """Which of the `replicas` ranks with this same range this one is: a save writes its part, a load fills all."""
    replicas: int = 1


class Update(NamedTuple):
    """What became of one optimizer step."""

    grad_norm: float
    """Global, before clipping; not finite where nothing was updated."""
    skipped: bool = False
    """fp16 only: gradients overflowed, nothing was updated, the loss scale was lowered. Not an error."""


class AbstractStrategy(ABC):
    """Places a model on devices and moves its gradients.

    Contract: after the last micro-batch each gradient is the mean over ranks of that rank's summed loss gradients.
    No strategy scales a loss; the engine does.
    """

    module: nn.Module
    """What is called with a batch."""

    @abstractmethod
    def wrap(self, bundle: ModelBundle) -> None:
        """Place, shard and load: from meta to a module that trains. Collective."""

    @abstractmethod
    def micro(self, *, sync: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `sync` on the last one of a step."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None: ...

    @abstractmethod
    def step(self, lr: float) -> Update:
        """Clip, update, clear the gradients. Collective. Where the norm is not finite nothing is updated."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """What this rank owns of every trainable parameter, to save and to load; not where the spec is `unsavable`."""

    @abstractmethod
    def frozen_shards(self) -> Iterator[Shard]:
        """What this rank holds of every parameter that is not trained: `weight` alone, in the dtype that it is computed
        with. Not where the spec is `unsavable`.
        """

    @abstractmethod
    def counters(self) -> dict[str, float]:
        """What is part of no shard, the same on all ranks: `updates` taken by the optimizer; in fp16 `loss_scale`, and
        `good_steps` since the last overflow.
        """

    @abstractmethod
    def restore(self, counters: Mapping[str, float]) -> None:
        """Make empty optimizer state as after so many updates, which `shards` then show to be filled."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring the compute weights in line with the fp32 masters after `shards` were filled. Collective."""

    @abstractmethod
    def full_state(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, or those of these names, whole, fp32 on the CPU, one at a time, in the module's order; the
        same on all. Collective.
        """
