"""Rows of different lengths into the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.batch import Batch
from dtrain.data.rows import Row

_IDLE_TOKENS = 2


def collate(rows: Sequence[Row], ids: Sequence[int], pad_id: int, *, pad_to: int | None = None) -> Batch:
    """The batch that `data.batch` describes, padded to the longest row or to `pad_to`; no rows give the idle batch."""
    assert len(rows) == len(ids), (len(rows), len(ids))
    if not rows:
        return _batch(np.full((1, _IDLE_TOKENS), pad_id), np.arange(_IDLE_TOKENS)[None], _NONE, _NONE, 0, ())
    lengths = np.array([len(row.tokens) for row in rows])
    width = max(int(lengths.max()), pad_to or 0)
    assert pad_to is None or width == pad_to, f"a row of {width} tokens does not fit into {pad_to}"

    columns = _counts(lengths)
    flat = np.repeat(np.arange(len(rows)) * width, lengths) + columns
    tokens = np.full(len(rows) * width, pad_id, np.int64)
    real = np.concatenate([row.tokens for row in rows])
    tokens[flat] = real

    # Padding counts from 0 too, as a document of its own that no other sees.
    paddings = width - lengths
    positions = np.empty(len(rows) * width, np.int64)
    positions[flat] = _counts(np.concatenate([row.lengths for row in rows]))
    positions[np.repeat(np.arange(len(rows)) * width + lengths, paddings) + _counts(paddings)] = _counts(paddings)

    # What is learned at p is predicted at p - 1, which is in the same document: the first token of one is no target.
    targets = np.concatenate([row.targets for row in rows])
    shape = (len(rows), width)
    return _batch(tokens.reshape(shape), positions.reshape(shape), flat[targets] - 1, real[targets], len(real), ids)


_NONE = np.empty(0, np.int64)


def _counts(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """0, 1, ... for each length in turn: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    counts: NDArray[np.int64] = np.arange(total, dtype=np.int64)
    counts -= np.repeat(ends - lengths, lengths)
    return counts


def _batch(
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    target_index: NDArray[np.int64],
    target_ids: NDArray[np.integer],
    num_tokens: int,
    ids: Sequence[int],
) -> Batch:
    arrays = {"tokens": tokens, "positions": positions, "target_index": target_index, "target_ids": target_ids}
    inputs = {name: torch.from_numpy(array.astype(np.int64, copy=False)) for name, array in arrays.items()}
    return Batch(inputs, len(target_index), num_tokens, tuple(int(i) for i in ids))
