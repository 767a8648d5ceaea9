"""Labelled texts: the label is what a language model writes after the text, out of a list of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Example, Labelled
from dtrain.errors import DataError
from dtrain.objectives.replies import wrong_shape

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Around, Before, Loss

_MOST = 1000
"""Labels: with more of them, they are texts of their own."""


@spec
class Classify(ObjectiveSpec):
    """A target is a text: the loss is minus the log-probability of its label and of the token that ends a text, after
    the text and a new line. In an eval every label is tried after each text, and the likeliest counts.
    """

    keeps_targets: ClassVar[bool] = True

    labels: tuple[str, ...] = ()
    """The labels that there are; found in the data where none are named. One that is not among them is a bad row."""

    def problems(self) -> list[str]:
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            return [f"objective.labels: {', '.join(twice)} named twice; name each once"]
        if len(self.labels) == 1:
            return [f"objective.labels=[{self.labels[0]}]: one label leaves nothing to learn; name at least two"]
        return []

    def settle(self, examples: Iterable[Example]) -> Mapping[str, Any]:
        if self.labels:
            return {}
        found: set[str] = set()
        for example in examples:
            if isinstance(example, Labelled):
                found.add(example.label)
            if len(found) > _MOST:
                raise DataError(f"{example.source}: more than {_MOST:,} different labels; name those that are meant "
                                f"with objective.labels=[...], or learn them by objective=sft")  # fmt: skip
        if len(found) == 1:
            raise DataError(f"dataset: all rows have one label, {found.pop()!r}, which leaves nothing to learn; add "
                            f"rows with others")  # fmt: skip
        return {"labels": sorted(found)}

    def notes(self, shape: type[Example]) -> list[str]:
        more = f" and {len(self.labels) - 10} more" if len(self.labels) > 10 else ""
        return [f"objective: classify: {len(self.labels)} labels: {', '.join(self.labels[:10])}{more}"]

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        from dtrain.data.rows import Row

        if not isinstance(example, Labelled):
            raise wrong_shape(self, example, "labelled texts", "columns `text` and `label`")
        if example.label not in self.labels:
            raise BadRowError(f"a label that is not one of objective.labels: {example.label!r}; there are: "
                              f"{', '.join(self.labels[:20])}")  # fmt: skip
        read, learned = tokenizer.encode(f"{example.text}\n"), written(example.label, tokenizer)
        return Row(
            tokens=np.array([*read, *learned], np.int32),
            targets=np.arange(len(read) + len(learned)) >= len(read),
            lengths=np.array([len(read) + len(learned)], np.int32),
            labels=np.array([self.labels.index(example.label)], np.int32),
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

    def metrics(self, sums: Mapping[str, Sequence[float]], num_targets: int) -> Mapping[str, float]:
        from dtrain.objectives._classes import scores

        return scores(self.confusion(sums)[1])

    def confusion(self, sums: Mapping[str, Sequence[float]]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
        num, counts = len(self.labels), [int(value) for value in sums["confusion"]]
        return self.labels, [counts[i * num : (i + 1) * num] for i in range(num)]


def written(label: str, tokenizer: TextTokenizer) -> list[int]:
    """Tokens of a label as they are learned: by themselves, since a model that is asked sees the text's alone."""
    return [*tokenizer.encode(label), tokenizer.eos_id]
