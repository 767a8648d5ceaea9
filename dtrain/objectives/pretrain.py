"""Plain text: every token is learned from those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.base import Example, Text
from dtrain.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


@spec
class Pretrain(ObjectiveSpec):
    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        from dtrain.data.rows import Row

        if not isinstance(example, Text):
            raise DataError(f"{example.source}: a {type(example).__name__.lower()} row, and objective=pretrain learns "
                            f"plain text; use objective=sft, or a dataset of texts")  # fmt: skip
        tokens = np.asarray([*tokenizer.encode(example.text), tokenizer.eos_id], dtype=np.int32)
        targets = np.ones(len(tokens), dtype=np.bool_)
        targets[0] = False
        return Row(tokens=tokens, targets=targets, lengths=np.asarray([len(tokens)], dtype=np.int32))

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._causal import causal_loss

        return causal_loss
