"""What an objective returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch: a SUM over its targets, so that any split of a batch adds up to the same."""

    total: torch.Tensor
    """fp32 scalar, attached to every trainable parameter even where there is no target."""
    num_targets: int
    extras: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Further sums over targets, for the trackers; the same names in every micro-batch of every rank."""
