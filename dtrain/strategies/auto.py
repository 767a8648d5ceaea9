from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

from pydantic import Field

from dtrain.config.spec import StrategySpec, spec

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.plan.memory import Need, StateBytes
    from dtrain.plan.world import World
    from dtrain.strategies.base import AbstractStrategy, Optim


@spec
class Auto(StrategySpec):
    """Stands for the first choice that fits; the plan puts that one in its place."""

    order: Annotated[tuple[str, ...], Field(min_length=1)]
    """Choices of this group, the cheapest in communication first."""

    def candidates(self) -> tuple[str, ...]:
        return self.order

    def states(self, need: Need) -> StateBytes:
        self._not_settled()

    def build(self, world: World, comm: AbstractComm, optim: Optim) -> AbstractStrategy:
        self._not_settled()

    def _not_settled(self) -> NoReturn:
        raise AssertionError("the plan settles strategy=auto before anything is built")
