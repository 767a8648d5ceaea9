"""Texts and their labels: the loss, and which label a model would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.data.rows import Row
from dtrain.objectives._documents import LABELS, by_document, log_probs, part, starts_of, with_about
from dtrain.objectives.base import Loss

CONFUSION = "confusion"
"""In a loss's extras: how often each label was taken for each, row by row."""
_READ, _STARTS, _LABEL = "read", "starts", "label-{}."


def with_prompts(rows: Sequence[Row], ids: Sequence[int], pad_id: int) -> Batch:
    """A text is one target; where each begins in the flattened tokens, and how many of its tokens are read."""
    batch = by_document(rows, ids, pad_id)
    width = batch.inputs["tokens"].shape[1]
    starts = [i * width + starts_of(row) for i, row in enumerate(rows)]
    read = [np.add.reduceat(~row.targets, starts_of(row), dtype=np.int64) for row in rows]
    more = {name: torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays]))
            for name, arrays in ((_STARTS, starts), (_READ, read))}  # fmt: skip
    return with_about(batch, more)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """Of held-out micro-batches, the same with each of the labels written after every text."""

    labels: Sequence[Sequence[int]]
    """Their tokens."""
    pad_id: int

    def __call__(self, batches: Sequence[Batch], *, held_out: bool) -> Sequence[Batch]:
        return [self._with_candidates(batch) for batch in batches] if held_out else batches

    def _with_candidates(self, batch: Batch) -> Batch:
        tokens = batch.inputs["tokens"].cpu().numpy()
        starts, read = (batch.about[name].cpu().tolist() for name in (_STARTS, _READ))
        texts: list[list[np.ndarray]] = [[] for _ in batch.sample_ids]
        for start, num in zip(starts, read, strict=True):
            texts[start // tokens.shape[1]].append(tokens.reshape(-1)[start : start + num])
        more: dict[str, torch.Tensor] = {}
        for k, label in enumerate(self.labels):
            rows = [_row(row, np.array(label)) for row in texts]
            one = by_document(rows, batch.sample_ids, self.pad_id).to(batch.inputs["tokens"].device)
            more |= {_LABEL.format(k) + name: tensor for name, tensor in {**one.inputs, **one.about}.items()}
        return with_about(batch, more)


def _row(texts: Sequence[np.ndarray], label: np.ndarray) -> Row:
    tokens = np.concatenate([part for text in texts for part in (text, label)]).astype(np.int32)
    targets = np.concatenate([np.arange(len(text) + len(label)) >= len(text) for text in texts])
    return Row(tokens, targets, np.array([len(text) + len(label) for text in texts], np.int32))


def label_loss(module: nn.Module, batch: Batch) -> Loss:
    total = -log_probs(module, batch).sum()
    candidates = {name.partition(".")[0] + "." for name in batch.about if name.startswith("label-")}
    if not candidates:
        return Loss(total, batch.num_targets)
    each = [log_probs(module, part(batch, _LABEL.format(k))) for k in range(len(candidates))]
    return Loss(total, batch.num_targets, {CONFUSION: confusion(torch.stack(each, dim=1), batch.about[LABELS])})


def output_loss(module: nn.Module, batch: Batch) -> Loss:
    """For models with an output for each label."""
    scores_NK, labels = module(**batch.inputs), batch.about[LABELS]
    extras = {} if torch.is_grad_enabled() else {CONFUSION: confusion(scores_NK, labels)}
    return Loss(nn.functional.cross_entropy(scores_NK, labels, reduction="sum"), batch.num_targets, extras)


def confusion(scores_NK: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[K, K] fp32: how many of each label (row) were taken for each (column), by the highest score."""
    num = scores_NK.shape[1]
    places = labels * num + scores_NK.argmax(1)
    return torch.bincount(places, minlength=num * num).float().view(num, num)
