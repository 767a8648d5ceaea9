"""Pairs of replies: the mean log-probability of a token is the reward, and there is no reference model (SimPO)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import spec
from dtrain.objectives.replies import AbstractPairs, NotNegative, Positive

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.objectives.base import Loss


@spec
class SimPO(AbstractPairs):
    """arXiv 2405.14734."""

    of_loss: ClassVar[frozenset[str]] = frozenset({"beta", "gamma"})
    lr_scale: ClassVar[float] = 0.05

    beta: Positive = 2.0
    """What the mean log-probability of a reply's tokens is multiplied by."""
    gamma: NotNegative = 1.0
    """By how much the reward of the chosen reply is to exceed that of the rejected one."""

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._preference import SimPOLoss

        return SimPOLoss(self)
