"""Next-token prediction: the loss of a model that gives the sum of its cross-entropy over targets."""

from __future__ import annotations

from torch import nn

from dtrain.data.batch import Batch
from dtrain.objectives.base import Loss


def causal_loss(module: nn.Module, batch: Batch) -> Loss:
    return Loss(total=module(**batch.inputs), num_targets=batch.num_targets)
