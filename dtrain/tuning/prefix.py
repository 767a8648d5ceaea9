from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class Prefix(TuningSpec):
    """Keys and values that every layer attends to before each document are trained (arXiv 2101.00190), by peft; the
    model stays as it is.
    """

    lr_scale: ClassVar[float] = 100.0
    elsewhere: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_size": "tuning.encoder_hidden",
        "prefix_projection": "tuning.projection",
        "init_weights": "tuning.init",
    }

    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """How many places they are for. None is a target, and each document has them to itself."""
    init: Literal["normal", "zero"] = "normal"
    """What they start as."""
    projection: bool = False
    """Have a small network make them, which is trained with what goes into it."""
    encoder_hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of that network's hidden layer; null is that of a layer's keys."""
    init_from: str = ""
    """A folder with an adapter of the same kind, to start from instead; without projection."""

    def problems(self) -> list[str]:
        found = []
        if self.projection and self.init_from:
            found.append(f"tuning.init_from={self.init_from}: a folder has what the network made, and with "
                         f"tuning.projection=true what goes into it is wanted; leave one of them out")  # fmt: skip
        if self.init_from and self.init != "normal":
            found.append(f"tuning.init_from={self.init_from}: the adapter says what is started from, tuning.init="
                         f"{self.init} another start; leave one of them out")  # fmt: skip
        if self.encoder_hidden and not self.projection:
            found.append(f"tuning.encoder_hidden={self.encoder_hidden}: of a network that there is with "
                         f"tuning.projection=true alone; set that, or leave it out")  # fmt: skip
        return found

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from peft import PrefixTuningConfig

        from dtrain.tuning import _prompts

        config = PrefixTuningConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM",
                                    prefix_projection=self.projection, encoder_hidden_size=self.encoder_hidden,  # type: ignore[arg-type]
                                    init_weights="zero" if self.init == "zero" else None)  # fmt: skip
        what = _prompts.Prompt(kind="prefix", config=config, init_from=self.init_from)
        return _prompts.add(bundle, what, seed=seed)

    def num_trainable(self, figures: Figures) -> int:
        wide = figures.kv_heads * figures.head_dim
        out = 2 * figures.layers * wide
        if not self.projection:
            return self.num_virtual_tokens * out
        inner = self.encoder_hidden or wide
        return self.num_virtual_tokens * wide + (wide + 1) * inner + (inner + 1) * out

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params

    def num_virtual(self) -> int:
        return self.num_virtual_tokens

    def moves_first(self, name: str) -> bool:
        """A last layer of zeros hands nothing down to what is before it until it has moved."""
        return not (self.projection and self.init == "zero") or ".transform.2." in name
