r"""A network and an objective of your own: images of handwritten digits, under every strategy.

In this folder, with scikit-learn for its images:

    pip install scikit-learn
    PYTHONPATH=. dtrain launch --config-dir conf plugins=[digits] model=python model.function=digits:network \
        objective=digits dataset=python dataset.function=digits:images dataset.packing=false dataset.max_length=64 \
        optim.lr=0.01 strategy=zero3 launcher.procs=2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.data.batch import Batch
from dtrain.data.rows import Row
from dtrain.data.tokenizer import TextTokenizer
from dtrain.objectives.base import Loss


def images() -> Iterator[dict[str, str]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for pixels, digit in zip(data.data, data.target, strict=True):
        yield {"text": " ".join(str(int(pixel)) for pixel in pixels), "label": str(digit)}


def network(hidden: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@spec
class Digits(ObjectiveSpec):
    """A text is the 64 pixels of an image, a label its digit; an image is one target."""

    learns_tokens: ClassVar[bool] = False
    measured: ClassVar[tuple[str, ...]] = ("accuracy",)

    def encode(self, example: Any, tokenizer: TextTokenizer) -> Row:
        pixels, label = np.array(example.text.split(), np.int32), np.array([example.label], np.int32)
        return Row(pixels, np.zeros(64, np.bool_), np.array([64], np.int32), label)

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        return stack

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        return loss


def stack(rows: Sequence[Row], ids: Sequence[int], pad_id: int) -> Batch:
    pixels = np.stack([row.tokens for row in rows]) if rows else np.zeros((1, 64))
    labels = torch.tensor([int(row.labels[0]) for row in rows], dtype=torch.int64)
    return Batch({"input": torch.tensor(pixels) / 16}, len(rows), 64 * len(rows), tuple(ids), {"labels": labels})


def loss(module: nn.Module, batch: Batch) -> Loss:
    labels = batch.about["labels"]
    scores = module(**batch.inputs)[: len(labels)].float()
    right = (scores.argmax(1) == labels).sum()
    return Loss(nn.functional.cross_entropy(scores, labels, reduction="sum"), len(labels), {"accuracy": right})
