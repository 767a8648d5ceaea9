"""The objective that the rows call for: conversations are fine-tuned on, plain text is pretrained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.base import Chat, Example, Text
from dtrain.errors import DataError
from dtrain.objectives.pretrain import Pretrain
from dtrain.objectives.sft import SFT

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


@spec
class Auto(ObjectiveSpec):
    def resolve(self, shape: type[Example]) -> ObjectiveSpec:
        if issubclass(shape, Chat):
            return SFT()
        if issubclass(shape, Text):
            return Pretrain()
        raise DataError(f"objective=auto: no objective for rows of shape {shape.__name__}; name one with objective=")

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        return self.resolve(type(example)).encode(example, tokenizer)

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._causal import causal_loss

        return causal_loss
