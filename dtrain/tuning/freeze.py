from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class Freeze(TuningSpec):
    """Named parts are trained, the rest stays as it is."""

    last_layers: Annotated[int, Field(ge=0)] = 2
    """How many of the repeated layers, counted from the end, are trained."""
    norms: bool = False
    """Every norm is trained, those of layers that stay as they are too."""
    embeddings: bool = False
    """The embedding of tokens is trained; with it the head of a model that ties them."""
    head: bool = False
    """The projection to the vocabulary is trained; with it the embedding of a model that ties them."""
    patterns: tuple[str, ...] = ()
    """Further parameters by name, as `*.q_proj.weight`; `*` stands for anything."""

    def problems(self) -> list[str]:
        if self.last_layers or self.norms or self.embeddings or self.head or self.patterns:
            return []
        return ["tuning.last_layers=0: nothing is left to train; give at least one of last_layers, norms, embeddings, "
                "head and patterns"]  # fmt: skip

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from dtrain.tuning._parts import chosen

        names = chosen(self, bundle)
        for name, param in bundle.module.named_parameters():
            param.requires_grad_(name in names)
        return bundle

    def num_trainable(self, figures: Figures) -> int:
        """Without what `patterns` names, which only the model itself can tell."""
        f, last = figures, min(self.last_layers, figures.layers)
        num = last * f.num_block_params
        if self.norms:
            num += (f.layers - last) * (f.norms * f.hidden + 2 * f.head_dim * f.qk_norms) + f.hidden
        if (self.embeddings or self.head) and f.tied:
            return num + f.vocab * f.hidden
        return num + f.vocab * f.hidden * (self.embeddings + self.head)
