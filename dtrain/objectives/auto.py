"""The objective that the rows call for: conversations and answers are fine-tuned on, texts classified, pairs of
replies compared, judged ones weighed, and plain text is pretrained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.base import Chat, Completion, Example, Judged, Labelled, Preference, Text
from dtrain.errors import DataError
from dtrain.objectives.classify import Classify
from dtrain.objectives.dpo import DPO
from dtrain.objectives.kto import KTO
from dtrain.objectives.pretrain import Pretrain
from dtrain.objectives.sft import SFT, TrainOn

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


@spec
class Auto(ObjectiveSpec):
    train_on: TrainOn = "assistant"
    """Whose messages of a conversation are learned: the assistant's; only those of its last turn, after the last
    message of the user; all; or those of a list of roles. A message that has `train` decides itself."""

    def problems(self) -> list[str]:
        return SFT(train_on=self.train_on).problems()

    def candidates(self) -> Sequence[ObjectiveSpec]:
        return (Pretrain(), SFT(train_on=self.train_on), Classify(), DPO(train_on=self.train_on),
                KTO(train_on=self.train_on))  # fmt: skip

    def resolve(self, shape: type[Example]) -> ObjectiveSpec:
        if issubclass(shape, Chat | Completion):
            return SFT(train_on=self.train_on)
        if issubclass(shape, Labelled):
            return Classify()
        if issubclass(shape, Preference):
            return DPO(train_on=self.train_on)
        if issubclass(shape, Judged):
            return KTO(train_on=self.train_on)
        if issubclass(shape, Text):
            if self.train_on != "assistant":
                raise DataError(f"objective.train_on={self.train_on}: the rows are texts, of which all is learned; "
                                f"leave it out, or use a dataset of conversations")  # fmt: skip
            return Pretrain()
        raise DataError(f"objective=auto: no objective for rows of shape {shape.__name__}; name one with objective=")

    def among(self, shapes: Sequence[type[Example]]) -> ObjectiveSpec:
        found = {type(self.resolve(shape)) for shape in shapes}
        if len(shapes) == 1 or found <= {SFT, Pretrain}:
            return self.resolve(shapes[0]) if len(shapes) == 1 else self
        names = " and ".join(shape.__name__.lower() for shape in shapes)
        raise DataError(f"objective=auto: the sources of the mixture have rows of {names}, which are not learned by "
                        f"one loss; name one with objective=, such as sft")  # fmt: skip

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        return self.resolve(type(example)).encode(example, tokenizer)

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives.base import causal_loss

        return causal_loss
