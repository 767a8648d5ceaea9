"""Pairs of replies: the chosen one is learned, and its odds against the rejected one are raised (ORPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import spec
from dtrain.objectives.replies import AbstractPairs, Positive

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.objectives.base import Loss


@spec
class ORPO(AbstractPairs):
    """arXiv 2403.07691. There is no reference model."""

    of_loss: ClassVar[frozenset[str]] = frozenset({"weight"})
    lr_scale: ClassVar[float] = 0.25
    measured: ClassVar[tuple[str, ...]] = (*AbstractPairs.measured, "nll", "log_odds")

    weight: Positive = 0.1
    """Of the odds ratio's term beside the cross-entropy of the chosen reply, which is the mean over its tokens; lambda
    in the paper, beta in other libraries."""

    elsewhere: ClassVar[Mapping[str, str]] = {"beta": "objective.weight", "lambda": "objective.weight"}

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._preference import ORPOLoss

        return ORPOLoss(self)
