from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class PTuning(TuningSpec):
    """As `prompt`, with a small network that makes the embeddings, and is trained with them (arXiv 2103.10385)."""

    lr_scale: ClassVar[float] = 10.0
    elsewhere: ClassVar[Mapping[str, str]] = {"encoder_hidden_size": "tuning.encoder_hidden"}

    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """How many embeddings every document begins with. None is a target, and each document has them to itself."""
    encoder_hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of the network's two hidden layers; null is that of the model."""

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from peft import PromptEncoderConfig

        from dtrain.tuning import _prompts

        # Not the LSTM that peft has too: its kernels keep pointers to weights, which strategies that divide them move.
        config = PromptEncoderConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM",
                                     encoder_reparameterization_type="MLP",
                                     encoder_hidden_size=self.encoder_hidden)  # type: ignore[arg-type]  # fmt: skip
        return _prompts.add(bundle, _prompts.Prompt(kind="ptuning", config=config), seed=seed)

    def num_trainable(self, figures: Figures) -> int:
        wide, inner = figures.hidden, self.encoder_hidden or figures.hidden
        layers = (wide + 1) * inner + (inner + 1) * inner + (inner + 1) * wide
        return self.num_virtual_tokens * wide + layers

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params

    def num_virtual(self) -> int:
        return self.num_virtual_tokens
