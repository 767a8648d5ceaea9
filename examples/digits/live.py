"""What computes: the network, its fresh weights, a micro-batch of images and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.data.rows import Row
from dtrain.models.base import AbstractWeights, ModelBundle
from dtrain.objectives.base import Loss


class Fresh(AbstractWeights):
    def __init__(self, module: nn.Module, seed: int) -> None:
        self.shapes = {name: param.shape for name, param in module.named_parameters()}
        self.seed = seed

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.seed + sum(name.encode()))
        return torch.randn(self.shapes[name], generator=draw).mul(0.1).flatten()[start : start + numel]


class Layers(nn.Sequential):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels.to(next(self.parameters()).dtype)).float()


def bundle(assets: Path, pixels: int, hidden: int, classes: int, *, seed: int) -> ModelBundle:
    with torch.device("meta"):
        module = Layers(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return ModelBundle(module, [module[0]], Fresh(module, seed), str, assets)


def images(rows: Sequence[Row], ids: Sequence[int], pad_id: int) -> Batch:
    pixels = np.stack([row.tokens for row in rows]) if rows else np.zeros((1, 64))
    labels = torch.tensor([int(row.labels[0]) for row in rows], dtype=torch.int64)
    inputs = {"pixels": torch.from_numpy(pixels).float() / 16}
    return Batch(inputs, len(rows), 64 * len(rows), tuple(ids), {"labels": labels})


def cross_entropy(module: nn.Module, batch: Batch) -> Loss:
    labels = batch.about["labels"]
    scores = module(**batch.inputs)[: len(labels)]
    right = (scores.argmax(1) == labels).sum()
    return Loss(nn.functional.cross_entropy(scores, labels, reduction="sum"), len(labels), {"accuracy": right})
