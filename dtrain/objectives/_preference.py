"""Losses over pairs of replies and over judged ones, each as the sum over its targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from dtrain.objectives._documents import LABELS, LEARNED, REFERENCE, log_probs
from dtrain.objectives.base import Loss

if TYPE_CHECKING:
    from dtrain.data.batch import Batch
    from dtrain.objectives.dpo import DPO
    from dtrain.objectives.kto import KTO
    from dtrain.objectives.orpo import ORPO
    from dtrain.objectives.simpo import SimPO

KL = "kl"
"""In `Batch.about`: fp32 scalar, how far the model has gone from the reference, over the whole global batch."""


@dataclasses.dataclass(frozen=True, slots=True)
class DPOLoss:
    spec: DPO

    def __call__(self, module: nn.Module, batch: Batch) -> Loss:
        spec, found = self.spec, log_probs(module, batch)
        gained = found - batch.about[REFERENCE]
        if spec.loss == "ipo":
            gained = gained / batch.about[LEARNED]
        chosen, rejected = gained[0::2], gained[1::2]
        margin = chosen - rejected
        if spec.loss == "sigmoid":
            smooth = spec.label_smoothing
            each = -(1 - smooth) * logsigmoid(spec.beta * margin) - smooth * logsigmoid(-spec.beta * margin)
        elif spec.loss == "hinge":
            each = torch.relu(1 - spec.beta * margin)
        else:
            each = (margin - 1 / (2 * spec.beta)).square()
        return _of_pairs(each, batch, spec.beta * chosen, spec.beta * rejected)


@dataclasses.dataclass(frozen=True, slots=True)
class SimPOLoss:
    spec: SimPO

    def __call__(self, module: nn.Module, batch: Batch) -> Loss:
        rewards = self.spec.beta * log_probs(module, batch) / batch.about[LEARNED]
        chosen, rejected = rewards[0::2], rewards[1::2]
        return _of_pairs(-logsigmoid(chosen - rejected - self.spec.gamma), batch, chosen, rejected)


@dataclasses.dataclass(frozen=True, slots=True)
class ORPOLoss:
    spec: ORPO

    def __call__(self, module: nn.Module, batch: Batch) -> Loss:
        found = log_probs(module, batch) / batch.about[LEARNED]
        chosen, rejected = found[0::2], found[1::2]
        odds = log_odds(chosen) - log_odds(rejected)
        each = -chosen - self.spec.weight * logsigmoid(odds)
        return _of_pairs(
            each, batch, self.spec.weight * chosen, self.spec.weight * rejected, nll=-chosen, log_odds=odds
        )


@dataclasses.dataclass(frozen=True, slots=True)
class KTOLoss:
    spec: KTO

    def __call__(self, module: nn.Module, batch: Batch) -> Loss:
        spec, kl = self.spec, batch.about[KL]
        rewards = spec.beta * (log_probs(module, batch) - batch.about[REFERENCE])
        good = batch.about[LABELS] == 1
        values = torch.sigmoid(torch.where(good, rewards - spec.beta * kl, spec.beta * kl - rewards))
        weights = torch.where(good, spec.good_weight, spec.bad_weight)
        zero = torch.zeros_like(rewards)
        extras = {"rewards/good": torch.where(good, rewards, zero), "rewards/bad": torch.where(good, zero, rewards),
                  "share_good": good.float(), "kl": kl.expand_as(rewards)}  # fmt: skip
        return Loss((weights * (1 - values)).sum(), batch.num_targets, _summed(extras))


def reward_loss(module: nn.Module, batch: Batch) -> Loss:
    """For models with one output."""
    rewards = module(**batch.inputs)[:, 0]
    chosen, rejected = rewards[0::2], rewards[1::2]
    return _of_pairs(-logsigmoid(chosen - rejected), batch, chosen, rejected)


def log_odds(log_prob: torch.Tensor) -> torch.Tensor:
    """`log(p / (1 - p))`, of the logarithm of p."""
    return log_prob - torch.log(-torch.expm1(log_prob))


def _of_pairs(
    each: torch.Tensor, batch: Batch, chosen: torch.Tensor, rejected: torch.Tensor, **further: torch.Tensor
) -> Loss:
    extras = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margin": chosen - rejected,
              "rewards/accuracy": (chosen > rejected).float(), **further}  # fmt: skip
    return Loss(each.sum(), batch.num_targets, _summed(extras))


def _summed(extras: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().sum() for name, value in extras.items()}
