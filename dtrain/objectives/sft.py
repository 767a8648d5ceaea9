"""Conversations: what the assistant says is learned, the rest is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.base import Chat, Example
from dtrain.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


@spec
class SFT(ObjectiveSpec):
    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        from dtrain.data.rows import Row

        if not isinstance(example, Chat):
            raise DataError(f"{example.source}: a {type(example).__name__.lower()} row, and objective=sft learns "
                            f"conversations; use objective=pretrain, or a dataset of chats")  # fmt: skip
        ids, learned = tokenizer.chat(example.messages)
        tokens, targets = np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=np.bool_)
        targets[:1] = False
        return Row(tokens=tokens, targets=targets, lengths=np.asarray([len(tokens)], dtype=np.int32))

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._causal import causal_loss

        return causal_loss
