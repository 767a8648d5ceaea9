from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec
from dtrain.tuning._sizes import num_added

if TYPE_CHECKING:
    from dtrain.config.spec import StrategySpec
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures
    from dtrain.plan.world import Device


@spec
class LoRA(TuningSpec):
    """Low-rank additions to linear layers are trained (arXiv 2106.09685), by peft; the model stays as it is."""

    lr_scale: ClassVar[float] = 10.0
    elsewhere: ClassVar[Mapping[str, str]] = {
        "r": "tuning.rank",
        "lora_alpha": "tuning.alpha",
        "lora_dropout": "tuning.dropout",
        "target_modules": "tuning.targets",
        "use_rslora": "tuning.rslora",
        "use_dora": "tuning.dora",
        "init_lora_weights": "tuning.init",
        "loraplus_lr_ratio": "tuning.lr_ratio",
    }

    rank: Annotated[int, Field(ge=1)] = 16
    """How many numbers are added for each input and each output of a layer: the width of the two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What is added is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the inputs of what is added."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers of the blocks that something is added to: all-linear, or names as `q_proj` or `*.mlp.*`."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"] = "kaiming"
    """What they start from. kaiming, gaussian: additions of nothing. pissa (arXiv 2404.02948) and olora (arXiv
    2406.01775): the strongest part of the layer's own weights, which is taken out there; pissa_niter_16 finds it faster
    and less exactly."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Train the norm of each output's weights by itself (arXiv 2402.09353)."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """The learning rate of the second factor, B, against that of the first (LoRA+, arXiv 2402.12354, uses 16)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole besides, as `lm_head` or `embed_tokens`."""
    init_from: str = ""
    """A folder with an adapter of the same kind, to start from instead."""

    def problems(self) -> list[str]:
        found = []
        if not self.targets:
            found.append("tuning.targets=[]: nothing would be added; give names of linear layers, or all-linear")
        if self.dora and self.init not in ("kaiming", "gaussian"):
            found.append(f"tuning.init={self.init}: not together with tuning.dora=true; leave one of them out")
        if self.init_from and self._takes_from_base:
            found.append(f"tuning.init_from={self.init_from}: the adapter says what is started from, tuning.init="
                         f"{self.init} does so too; leave one of them out")  # fmt: skip
        return found

    def misfits(self, strategy: StrategySpec, precision: str, device: Device) -> list[str]:
        if self.dora and getattr(strategy, "stage", 0) == 3:
            return ["tuning.dora=true: reads the weights of a layer outside of its own forward, when ZeRO-3 has "
                    "divided them again; use strategy=fsdp2 or zero2"]  # fmt: skip
        return []

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from dtrain.tuning._peft import Addition, add

        takes = self._takes_from_base
        what = Addition(make=self._config, targets=self.targets, also=self.modules_to_save, init_from=self.init_from,
                        of_base=takes or self.dora, changes_base=takes)  # fmt: skip
        return add(bundle, what, seed=seed)

    def _config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        init = {"kaiming": True}.get(self.init, self.init)
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets,  # type: ignore[arg-type]
                          init_lora_weights=init, use_rslora=self.rslora, use_dora=self.dora,  # type: ignore[arg-type]
                          bias="none", task_type="CAUSAL_LM")  # fmt: skip

    def num_trainable(self, figures: Figures) -> int:
        each = num_added(figures, self.targets, lambda rows, columns: self.rank * (rows + columns) + rows * self.dora)
        outside = {"lm_head": figures.vocab * figures.hidden, "embed_tokens": figures.vocab * figures.hidden}
        return each + sum(num for name, num in outside.items()
                          if any(fnmatch.fnmatchcase(name, one) for one in self.modules_to_save))  # fmt: skip

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params

    def lr_factor(self, name: str) -> float:
        return self.lr_ratio if ".lora_B." in name else 1.0

    def moves_first(self, name: str) -> bool:
        """The second factor starts from zeros, so that the first gets no gradient before it has moved."""
        return ".lora_A." not in name or self._takes_from_base

    @property
    def _takes_from_base(self) -> bool:
        """Whether what is added starts as a part of the layer's own weights."""
        return self.init.startswith(("pissa", "olora"))
