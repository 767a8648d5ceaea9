from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.config.spec import TuningSpec, spec
from dtrain.tuning._sizes import num_added

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class IA3(TuningSpec):
    """Factors on the outputs of some layers, and on the inputs of others, are trained (arXiv 2205.05638), by peft."""

    lr_scale: ClassVar[float] = 100.0

    outputs: tuple[str, ...] = ("k_proj", "v_proj")
    """Linear layers of the blocks whose outputs get a factor each."""
    inputs: tuple[str, ...] = ("down_proj",)
    """Linear layers of the blocks whose inputs get a factor each."""
    init_from: str = ""
    """A folder with an adapter of the same kind, to start from."""

    def problems(self) -> list[str]:
        both = sorted({*self.outputs} & {*self.inputs})
        found = [f"tuning.inputs={name}: in tuning.outputs too; a layer has factors on one side" for name in both]
        if not self.outputs and not self.inputs:
            found.append("tuning.outputs=[] and tuning.inputs=[]: nothing would be trained; name layers in one of them")
        return found

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from dtrain.tuning._peft import Addition, add

        return add(bundle, Addition(make=self._config, targets=(*self.outputs, *self.inputs), init_from=self.init_from),
                   seed=seed)  # fmt: skip

    def _config(self, targets: list[str]) -> Any:
        from peft import IA3Config

        inside = [name for name in targets if any(fnmatch.fnmatchcase(f".{name}", f"*.{one}") for one in self.inputs)]
        return IA3Config(target_modules=targets, feedforward_modules=inside, task_type="CAUSAL_LM")

    def num_trainable(self, figures: Figures) -> int:
        outputs = num_added(figures, self.outputs, lambda rows, columns: rows)
        return outputs + num_added(figures, self.inputs, lambda rows, columns: columns)

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params
