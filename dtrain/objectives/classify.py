"""Labelled texts: the label is what a language model writes after the text, out of a list of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import spec
from dtrain.datasets.base import Example
from dtrain.objectives.labels import AbstractLabels

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Around, Before, Loss


@spec
class Classify(AbstractLabels):
    """A target is a text: the loss is minus the log-probability of its label and of the token that ends a text, after
    the text and a new line. In an eval every label is tried after each text, and the likeliest counts.
    """

    keeps_targets: ClassVar[bool] = True

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        from dtrain.data.rows import Row

        one = self.checked(example)
        read, learned = tokenizer.encode(f"{one.text}\n"), written(one.label, tokenizer)
        return Row(
            tokens=np.array([*read, *learned], np.int32),
            targets=np.arange(len(read) + len(learned)) >= len(read),
            lengths=np.array([len(read) + len(learned)], np.int32),
            labels=np.array([self.labels.index(one.label)], np.int32),
        )

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from dtrain.objectives._classes import with_prompts

        return with_prompts

    def begin(self, around: Around) -> Before:
        from dtrain.data.tokenizer import TextTokenizer
        from dtrain.objectives._classes import Candidates

        tokenizer = TextTokenizer.load(around.assets)
        return Candidates([written(label, tokenizer) for label in self.labels], around.pad_id)

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._classes import label_loss

        return label_loss


def written(label: str, tokenizer: TextTokenizer) -> list[int]:
    """Tokens of a label as they are learned: by themselves, since a model that is asked sees the text's alone."""
    return [*tokenizer.encode(label), tokenizer.eos_id]
