from __future__ import annotations

from typing import TYPE_CHECKING

from dtrain.config.spec import TuningSpec, spec

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class Full(TuningSpec):
    """Every parameter is trained."""

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        bundle.module.requires_grad_(True)  # noqa: FBT003
        return bundle

    def num_trainable(self, figures: Figures) -> int:
        return figures.num_params

    def keeps(self) -> bool:
        return False
