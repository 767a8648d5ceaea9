from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec
from dtrain.tuning._sizes import num_added

if TYPE_CHECKING:
    from dtrain.config.spec import StrategySpec
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures
    from dtrain.plan.world import Device

Fraction = Annotated[float, Field(ge=0, lt=1)]


@spec
class AdaLoRA(TuningSpec):
    """Low-rank additions whose ranks are taken from where they matter least (arXiv 2303.10512), with peft's layers; the
    model stays as it is.
    """

    lr_scale: ClassVar[float] = 10.0
    state_bytes: ClassVar[int] = 8
    elsewhere: ClassVar[Mapping[str, str]] = {
        "r": "tuning.rank",
        "init_r": "tuning.rank",
        "target_r": "tuning.target_rank",
        "lora_alpha": "tuning.alpha",
        "lora_dropout": "tuning.dropout",
        "target_modules": "tuning.targets",
        "tinit": "tuning.warmup, a part of all steps",
        "tfinal": "tuning.final, a part of all steps",
        "deltaT": "tuning.every_steps",
        "total_step": "train.steps",
        "orth_reg_weight": "tuning.orthogonality",
    }

    rank: Annotated[int, Field(ge=1)] = 12
    """Of every addition at the start, and in the file that is exported: what was taken is zero there."""
    target_rank: Annotated[int, Field(ge=1)] = 8
    """What is left of it at the end, on average over the layers."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What is added is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of the inputs of what is added."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers of the blocks that something is added to: all-linear, or names as `q_proj` or `*.mlp.*`."""
    warmup: Fraction = 0.1
    """The part of all steps at the start in which nothing is taken."""
    final: Fraction = 0.3
    """The part of all steps at the end in which what was taken stays so, and the rest is trained."""
    every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between two looks at what is to be taken."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """How slowly the estimate of how much each number matters follows what the last step said."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """The same of how uncertain that is."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of what is added to the loss, once a step, to keep the directions of each addition apart: the mean
    distance of their products from the identity. The loss that is told is without it."""
    init_from: str = ""
    """A folder with an adapter of the same kind, to start from instead."""

    def problems(self) -> list[str]:
        found = []
        if not self.targets:
            found.append("tuning.targets=[]: nothing would be added; give names of linear layers, or all-linear")
        if self.target_rank > self.rank:
            found.append(f"tuning.target_rank={self.target_rank}: more than tuning.rank={self.rank}, from which ranks "
                         f"are taken; set it to at most that")  # fmt: skip
        if self.warmup + self.final >= 1:
            found.append(f"tuning.final={self.final:g}: with tuning.warmup={self.warmup:g} no steps are left in which "
                         f"ranks are taken; together they must be less than 1")  # fmt: skip
        return found

    def misfits(self, strategy: StrategySpec, precision: str, device: Device) -> list[str]:
        if (why := strategy.unsavable()) is None:
            return []
        return [f"tuning=adalora: which ranks are taken is read from the optimizer's state, and {why}; use tuning=lora"]

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from dtrain.tuning._adalora import alongside
        from dtrain.tuning._peft import Addition, add

        what = Addition(make=self._config, targets=self.targets, init_from=self.init_from)
        return alongside(add(bundle, what, seed=seed), self)

    def _config(self, targets: list[str]) -> Any:
        from peft import AdaLoraConfig

        # Peft wants a number of steps, for a schedule of its own that is not used.
        return AdaLoraConfig(init_r=self.rank, target_r=self.target_rank, lora_alpha=self.alpha, total_step=1,  # type: ignore[arg-type]
                             lora_dropout=self.dropout, target_modules=targets, deltaT=self.every_steps,
                             beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orthogonality,
                             bias="none", task_type="CAUSAL_LM")  # fmt: skip

    def num_trainable(self, figures: Figures) -> int:
        return num_added(figures, self.targets, lambda rows, columns: self.rank * (rows + columns + 1))

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params

    def moves_first(self, name: str) -> bool:
        """The values start from zeros, so that the directions get no gradient before these have moved."""
        return ".lora_A." not in name and ".lora_B." not in name
