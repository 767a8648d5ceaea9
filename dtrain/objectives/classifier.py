"""Labelled texts: the model gets one output for each label, read at the last token of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import spec
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Example
from dtrain.objectives.labels import AbstractLabels

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


@spec
class Classifier(AbstractLabels):
    """A target is a text: the loss is the cross-entropy of its label among the labels. The export is what transformers'
    AutoModelForSequenceClassification loads.
    """

    learns_tokens: ClassVar[bool] = False

    def outputs(self) -> Sequence[str]:
        return self.labels

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        from dtrain.data.rows import Row

        one = self.checked(example)
        tokens = np.array(tokenizer.encode(one.text), np.int32)
        if not len(tokens):
            raise BadRowError("a text without a token, which nothing can be said of")
        return Row(
            tokens=tokens,
            targets=np.zeros(len(tokens), np.bool_),
            lengths=np.array([len(tokens)], np.int32),
            labels=np.array([self.labels.index(one.label)], np.int32),
        )

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from dtrain.objectives._documents import by_last_token

        return by_last_token

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._classes import output_loss

        return output_loss
