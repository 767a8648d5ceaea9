"""What objectives over replies share: how a pair or a judged reply becomes documents, and what is wrong with a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.badrows import LeftOutError
from dtrain.datasets.base import Example, Preference
from dtrain.errors import DataError
from dtrain.objectives.sft import SFT, TrainOn

if TYPE_CHECKING:
    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Reference = Literal["auto", "adapters", "cached", "copy"]


@spec
class AbstractReplies(ObjectiveSpec):
    train_on: TrainOn = "assistant"
    """Whose messages of a reply count, each with the token that ends its turn, as under objective=sft."""

    def problems(self) -> list[str]:
        return SFT(train_on=self.train_on).problems()


@spec
class AbstractPairs(AbstractReplies):
    """A row is two documents, the prompt with the reply that is preferred and the prompt with the other; a target is a
    pair.
    """

    measured: ClassVar[tuple[str, ...]] = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        if not isinstance(example, Preference):
            raise wrong_shape(self, example, "pairs of replies", "columns `chosen` and `rejected`")
        sft = SFT(train_on=self.train_on)
        chosen, rejected = (sft.reply(example.prompt, reply, example.tools, tokenizer)
                            for reply in (example.chosen, example.rejected))  # fmt: skip
        if chosen.tokens.tolist() == rejected.tokens.tolist():
            raise LeftOutError("chosen and rejected are the same")
        return joined([chosen, rejected])

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from dtrain.objectives._documents import by_document

        return partial(by_document, each=2)


def joined(rows: Sequence[Row]) -> Row:
    """One row of the documents of several."""
    import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

    from dtrain.data.rows import Row

    return Row(*(np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "lengths")))


def wrong_shape(objective: ObjectiveSpec, example: Example, what: str, needed: str) -> DataError:
    name = type(objective).__name__.lower()
    return DataError(f"{example.source}: a {type(example).__name__.lower()} row, and objective={name} learns {what}, "
                     f"which need {needed}; use a dataset that has them, or another objective=")  # fmt: skip
