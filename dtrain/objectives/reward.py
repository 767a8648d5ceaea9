"""Pairs of replies: the model gets one output, a reward, which is to be higher for the chosen reply (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dtrain.config.spec import spec
from dtrain.objectives.replies import AbstractPairs

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.objectives.base import Loss


@spec
class Reward(AbstractPairs):
    """A target is a pair. The reward is read at the last token of the prompt with its reply. The export is what
    transformers' AutoModelForSequenceClassification loads.
    """

    def outputs(self) -> Sequence[str]:
        return ("reward",)

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from dtrain.objectives._documents import by_last_token

        return partial(by_last_token, each=2)

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives._preference import reward_loss

        return reward_loss
