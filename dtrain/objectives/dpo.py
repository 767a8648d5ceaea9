"""Pairs of replies: the chosen one is to gain more over a reference than the rejected one (DPO and its variants)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import spec
from dtrain.objectives.replies import AbstractPairs, Positive, Reference

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.objectives.base import Around, Before, Loss


@spec
class DPO(AbstractPairs):
    of_loss: ClassVar[frozenset[str]] = frozenset({"loss", "beta", "label_smoothing", "reference"})
    lr_scale: ClassVar[float] = 0.05

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Of how much more the chosen reply has gained: DPO's own (arXiv 2305.18290); the square of the distance from
    1/(2 beta), of means over tokens (IPO, arXiv 2310.12036); or what lacks to 1/beta (arXiv 2305.10425)."""
    beta: Positive = 0.1
    """How closely the model is held to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs that are taken to be judged the wrong way round; with loss=sigmoid."""
    reference: Reference = "auto"
    """Whose log-probabilities are compared with: of the model without its adapters (adapters); of the starting weights,
    computed once before the first step and kept (cached); of a further copy of them on each rank (copy). `auto` is
    adapters where the tuning has them, else cached."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.label_smoothing and self.loss != "sigmoid":
            found.append(f"objective.label_smoothing={self.label_smoothing:g}: goes with objective.loss=sigmoid, and "
                         f"loss={self.loss} knows none; leave it out")  # fmt: skip
        return found

    def begin(self, around: Around) -> Before | None:
        from dtrain.objectives._reference import reference

        return reference(self.reference, around)

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._preference import DPOLoss

        return DPOLoss(self)
