"""Plain text: every token is learned from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        return _row(tokenizer.encode(_text(example)), tokenizer.eos_id)

    def encode_many(self, examples: Sequence[Example], tokenizer: TextTokenizer) -> Sequence[Row]:
        eos_id = tokenizer.eos_id
        return [_row(ids, eos_id) for ids in tokenizer.encode_batch([_text(example) for example in examples])]

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives.base import causal_loss

        return causal_loss


def _text(example: Example) -> str:
    if not isinstance(example, Text):
        raise DataError(f"{example.source}: a {type(example).__name__.lower()} row, and objective=pretrain learns "
                        f"plain text; use objective=sft, or a dataset of texts")  # fmt: skip
    return example.text


def _row(ids: Sequence[int], eos_id: int) -> Row:
    import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

    from dtrain.data.rows import Row

    tokens = np.empty(len(ids) + 1, np.int32)
    tokens[:-1], tokens[-1] = ids, eos_id
    targets = np.ones(len(tokens), np.bool_)
    targets[0] = False
    return Row(tokens=tokens, targets=targets, lengths=np.array([len(tokens)], np.int32))
