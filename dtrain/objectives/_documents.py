"""Micro-batches whose targets are more than tokens, and the log-probability of what is learned of each document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.data.collate import collate
from dtrain.data.rows import Row

LEARNED = "learned"
"""In `Batch.about`: [D] int64, how many tokens are learned of each document, in the order in which they come."""
LABELS = "labels"
"""The labels of the rows, [examples] int64."""
REFERENCE = "reference"
"""[D] fp32: the log-probabilities by the model that training started from."""


def by_document(rows: Sequence[Row], ids: Sequence[int], pad_id: int, *, each: int = 1) -> Batch:
    """With `each` documents of every example, which is one target."""
    batch = collate(rows, ids, pad_id)
    learned = [np.add.reduceat(row.targets, starts_of(row), dtype=np.int64) for row in rows]
    labels = [row.labels for row in rows]
    about = {name: torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64, copy=False))
             for name, arrays in ((LEARNED, learned), (LABELS, labels))}  # fmt: skip
    num = len(about[LEARNED])
    assert num % each == 0, (num, each)
    return dataclasses.replace(batch, num_targets=num // each, about=about)


def by_last_token(rows: Sequence[Row], ids: Sequence[int], pad_id: int, *, each: int = 1) -> Batch:
    """The same for a model that is read at the last token of every document: its places are `target_index`."""
    batch = by_document(rows, ids, pad_id, each=each)
    width = batch.inputs["tokens"].shape[1]
    last = [i * width + np.cumsum(row.lengths, dtype=np.int64) - 1 for i, row in enumerate(rows)]
    inputs = {name: batch.inputs[name] for name in ("tokens", "positions")}
    inputs["target_index"] = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *last]))
    return dataclasses.replace(batch, inputs=inputs)


def starts_of(row: Row) -> np.ndarray:
    """Where each document of a row begins."""
    return np.cumsum(row.lengths, dtype=np.int64) - row.lengths


def log_probs(module: nn.Module, batch: Batch) -> torch.Tensor:
    """[D] fp32: of each document, the sum over what is learned of it; attached to every parameter."""
    each = module(**batch.inputs, each=True)
    return sums(each, batch.about[LEARNED])


def sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of so many values each, one after the other."""
    if not len(counts):
        return values.sum()[None][:0]
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)


OTHER = "other."
"""Before the names of what a second batch has, which travels in the first one's `about`."""


def in_turn(rows: Sequence[Row], ids: Sequence[int], pad_id: int) -> Batch:
    """The first of every two documents, of which each is one target; the second ones are a batch in its `about`."""
    first = by_document([_every_other(row, 0) for row in rows], ids, pad_id)
    second = by_document([_every_other(row, 1) for row in rows], ids, pad_id)
    other = {**second.inputs, LEARNED: second.about[LEARNED]}
    about = {**first.about, **{OTHER + name: tensor for name, tensor in other.items()}}
    return dataclasses.replace(first, num_tokens=first.num_tokens + second.num_tokens, about=about)


def part(batch: Batch, prefix: str) -> Batch:
    """The batch that travels under this prefix; without one itself."""
    if not prefix:
        return batch
    mine = {name.removeprefix(prefix): one for name, one in batch.about.items() if name.startswith(prefix)}
    inputs = {name: mine.pop(name) for name in batch.inputs}
    return dataclasses.replace(batch, inputs=inputs, about=mine)


def with_about(batch: Batch, more: Mapping[str, torch.Tensor]) -> Batch:
    return dataclasses.replace(batch, about={**batch.about, **more})


def _every_other(row: Row, first: int) -> Row:
    keep = np.repeat(np.arange(len(row.lengths)) % 2 == first, row.lengths)
    return Row(row.tokens[keep], row.targets[keep], row.lengths[first::2], row.labels)
