"""Replies that were judged one by one: the good ones are to gain over a reference, the bad ones to lose (KTO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import spec
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Example, Judged, Messages
from dtrain.objectives.replies import AbstractReplies, Positive, Reference, joined, wrong_shape
from dtrain.objectives.sft import SFT

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Around, Before, Loss


@dataclasses.dataclass(frozen=True, slots=True)
class Beside(Judged):
    """A judged reply, and one that was given to something else."""

    other: Messages = dataclasses.field(default_factory=list)


@spec
class KTO(AbstractReplies):
    """arXiv 2402.01306. A target is a reply.

    How far the model is from the reference is measured on replies that do not belong to their prompts: a row is two
    documents, the prompt with its reply and the prompt with that of the next row that has another prompt. The mean is
    taken over the whole global batch before its losses, by a forward without gradients.
    """

    of_loss: ClassVar[frozenset[str]] = frozenset({"beta", "good_weight", "bad_weight", "reference"})
    lr_scale: ClassVar[float] = 0.05
    measured: ClassVar[tuple[str, ...]] = ("rewards/good", "rewards/bad", "share_good", "kl")

    beta: Positive = 0.1
    """How closely the model is held to the reference."""
    good_weight: Positive = 1.0
    bad_weight: Positive = 1.0
    """Of the losses of good and bad replies: where one kind is rarer, n times the weight stands for n times as many."""
    reference: Reference = "auto"
    """Whose log-probabilities are compared with, as under objective=dpo."""

    def together(self, examples: list[Example]) -> list[Example]:
        judged = [one for one in examples if isinstance(one, Judged)]
        if len(judged) < len(examples):
            return examples
        return [Beside(one.source, one.prompt, one.completion, one.good, one.tools, judged[at].completion)
                for one, at in zip(judged, _elsewhere([one.prompt for one in judged]), strict=True)]  # fmt: skip

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

        if not isinstance(example, Judged):
            raise wrong_shape(self, example, "judged replies", "a column `label` of true and false")
        sft = SFT(train_on=self.train_on)
        own = sft.reply(example.prompt, example.completion, example.tools, tokenizer)
        other = own
        if isinstance(example, Beside):
            try:
                other = sft.reply(example.prompt, example.other, example.tools, tokenizer)
            except BadRowError:  # the row that it comes from is told of
                other = own
        return dataclasses.replace(joined([own, other]), labels=np.array([example.good], np.int32))

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from dtrain.objectives._documents import in_turn

        return in_turn

    def begin(self, around: Around) -> Before | None:
        from dtrain.objectives._documents import OTHER
        from dtrain.objectives._reference import Divergence, reference

        return Divergence(around, reference(self.reference, around, parts=("", OTHER)))

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._preference import KTOLoss

        return KTOLoss(self)


def _elsewhere(prompts: Sequence[Messages]) -> list[int]:
    """For each the place of the next prompt that is another, from the first again after the last; its own where all are
    the same.
    """
    num = len(prompts)
    found = list(range(num))
    following = None
    for i in reversed(range(2 * num)):
        at, after = i % num, (i + 1) % num
        if prompts[at] != prompts[after]:
            following = after
        if following is not None:
            found[at] = following
    return found
