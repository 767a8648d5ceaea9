"""How texts are laid out for the module that is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dtrain.engine.samples import _Together

POSITIONS = 10


class _Counts(nn.Module):
    """Has so many positions, and always goes on with 7."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(POSITIONS, 2)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, target_index: torch.Tensor) -> torch.Tensor:
        self.table(positions)  # raises beyond them
        return torch.full((len(target_index),), 7)


def test_padding_stays_within_the_positions() -> None:
    # After eight tokens two may follow, after one token nine.
    rooms = torch.tensor([2, 9])
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 8, 9], [0, 0, 0, 0, 0, 0, 0, 1]])
    how: Any = SimpleNamespace(max_new_tokens=9, pad_token_id=0, eos_token_id=None)
    model = _Together(SimpleNamespace(module=_Counts()), torch.device("cpu"), POSITIONS)  # type: ignore[arg-type]
    out = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), generation_config=how,
                         stopping_criteria=lambda out, scores: out.shape[1] - 8 >= rooms, streamer=None)  # fmt: skip
    assert out[:, 8:].tolist() == [[7, 7, 0, 0, 0, 0, 0, 0, 0], [7] * 9]
