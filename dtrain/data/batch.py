"""What one forward sees on one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. For causal language models `inputs` is, with B rows of T tokens and N targets in all:

    - `tokens` [B, T] int64, padded at the end;
    - `positions` [B, T] int64, from 0 in each document (a packed row restarts at each), padding counts on its own;
    - `target_index` [N] int64: flat positions in [0, B*T) whose hidden state predicts a target;
    - `target_ids` [N] int64: the token that each of them should predict.

    A rank with nothing to do gets a batch of one short row with N = 0, so that collectives match.
    """

    inputs: dict[str, torch.Tensor]
    num_targets: int
    """As the objective counts them: the loss is the mean over those of the global batch."""
    num_tokens: int
    """Without padding."""
    sample_ids: Sequence[int]
    """Index into the row store; empty for a batch that only keeps collectives matched."""
    about: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """What the objective needs besides, and the module does not get."""

    def to(self, device: torch.device) -> Batch:
        inputs, about = ({name: tensor.to(device, non_blocking=True) for name, tensor in some.items()}
                         for some in (self.inputs, self.about))  # fmt: skip
        return dataclasses.replace(self, inputs=inputs, about=about)
