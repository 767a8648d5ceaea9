"""Which parameters decay, and one update by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.optims.adamw import AdamW


def _named() -> list[tuple[str, nn.Parameter]]:
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return [("matrix", nn.Parameter(torch.ones(2, 2))), ("norm", nn.Parameter(torch.ones(2))), ("frozen", frozen)]


def test_matrices_decay_and_the_rest_does_not() -> None:
    groups = AdamW(lr=0.1, weight_decay=0.1).build(_named()).param_groups
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (0.1, [(2, 2)]), (0.0, [(2,)])]  # fmt: skip


def test_no_empty_group() -> None:
    only_norm = [("norm", nn.Parameter(torch.ones(2)))]
    assert len(AdamW(lr=0.1).build(only_norm).param_groups) == 1


def test_the_shape_that_deepspeed_keeps_beside_a_partitioned_parameter() -> None:
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]
    assert AdamW(lr=0.1, weight_decay=0.1).build([("w", param)]).param_groups[0]["weight_decay"] == 0.1


def test_one_step_by_hand() -> None:
    """After one step both corrected moments are the gradient's: the update is lr * g / (|g| + eps), and the decay."""
    param = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = AdamW(lr=0.1, weight_decay=0.5, eps=1e-8).build([("w", param)])
    param.grad = torch.tensor([[3.0]])
    optimizer.step()
    # 2 - 0.1 * 0.5 * 2 - 0.1 * 3 / 3
    assert param.item() == pytest.approx(1.8)
