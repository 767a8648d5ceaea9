"""Each document by itself, short ones of about the same length together: on any device, in any precision, without a
mask of the whole row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  as everybody calls it
from numpy.typing import NDArray

from dtrain.errors import ModelError
from dtrain.models.attention.base import Asked, Backend, bounds, needs_registry

GRID = np.array([16, 32, 48, 64, 96, 128])
"""Lengths that short documents are filled up to, to be computed together: their calls cost more than the arithmetic."""
FEW = 8
"""Fewer short documents than this are not put together: the rows would have to be copied."""
_BLOCK = 128
"""Least queries at a time where a window is shorter than the document."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    num: int
    """Documents."""
    length: int
    """Of each, filled up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
    """How the documents of a flat row of N tokens are gone through, in P >= N places."""

    groups: tuple[Group, ...]
    places: torch.Tensor | None
    """[P]: the token at each place. A document is filled up with its last token, whose further places come after all
    that is kept, and are not seen. None where the row is gone through as it is."""
    tokens: torch.Tensor | None
    """[N]: the place of each token."""

    @classmethod
    def of(cls, positions: torch.Tensor) -> Documents:
        """Of the positions [1, N] of a flat row, which are 0 where a document starts."""
        ends = bounds(positions).cpu().numpy()
        starts, lengths = ends[:-1], np.diff(ends)
        short = lengths <= GRID[-1]
        if short.sum() < FEW:
            same = itertools.groupby(lengths.tolist())
            return cls(tuple(Group(sum(1 for _ in run), length) for length, run in same), None, None)
        filled = np.where(short, GRID[np.searchsorted(GRID, np.minimum(lengths, GRID[-1]))], lengths)
        order = np.argsort(filled, kind="stable")
        places, tokens = _places(starts[order], lengths[order], filled[order])
        sizes, nums = np.unique(filled, return_counts=True)
        groups = tuple(Group(int(num), int(size)) for size, num in zip(sizes, nums, strict=True))
        there = (torch.from_numpy(one).to(positions.device) for one in (places, tokens))
        return cls(groups, *there)


Ints = NDArray[np.int64]


def _places(starts: Ints, lengths: Ints, filled: Ints) -> tuple[Ints, Ints]:
    """The token at each place, and the place of each token."""
    ends = np.cumsum(filled)
    within = np.arange(ends[-1]) - np.repeat(ends - filled, filled)
    last = np.repeat(lengths - 1, filled)
    places = np.repeat(starts, filled) + np.minimum(within, last)
    real = np.flatnonzero(within <= last)
    tokens = np.empty(len(real), np.int64)
    tokens[places[real]] = real
    return places, tokens


@dataclasses.dataclass(frozen=True, slots=True)
class _How:
    scale: float | None
    dropout: float
    softcap: float | None
    window: int | None
    """How many tokens one sees, itself among them; None where all before it."""


_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, _How], torch.Tensor]
"""Of queries [n, heads, L, head_dim], keys and values of perhaps fewer heads, and who sees whom [L, keys]; None where
each sees itself and those before it."""


def _forward_by(kernel: _Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(  # noqa: PLR0913  as transformers calls it
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        documents: Documents | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **further: Any,
    ) -> tuple[torch.Tensor, None]:
        """Queries, keys and values [1, heads, N, head_dim]; gives [1, N, heads, head_dim]."""
        if documents is None:
            raise ModelError("the model's layers do not hand on where its documents are")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise ModelError("the model's tokens see later ones")
        how = _How(scaling, dropout, softcap, sliding_window)
        parts = [x[0].transpose(0, 1) for x in (query, key, value)]
        if documents.places is not None:
            parts = [x.index_select(0, documents.places) for x in parts]
        sizes = [group.num * group.length for group in documents.groups]
        outs = []
        for group, *of_group in zip(documents.groups, *(x.split(sizes) for x in parts), strict=True):
            q, k, v = (x.unflatten(0, (group.num, group.length)).transpose(1, 2) for x in of_group)
            outs.append(_attend(q, k, v, how, kernel).transpose(1, 2).flatten(0, 1))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if documents.tokens is not None:
            out = out.index_select(0, documents.tokens)
        return out[None], None

    return forward


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: _How, kernel: _Kernel) -> torch.Tensor:
    """A window that is shorter than the document is gone through by blocks of queries: work and memory are of length
    times window.
    """
    length = q.shape[2]
    if how.window is None or length <= how.window:
        return kernel(q, k, v, None, how)
    outs = []
    for start in range(0, length, max(how.window, _BLOCK)):
        end = min(start + max(how.window, _BLOCK), length)
        first = max(0, start - how.window + 1)
        before = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        seen = (before >= 0) & (before < how.window)
        outs.append(kernel(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], seen, how))
    return torch.cat(outs, dim=2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, how: _How) -> torch.Tensor:
    if how.softcap is not None:
        raise ModelError("caps no scores")
    grouped = q.shape[1] != k.shape[1]
    if grouped and seen is not None and q.is_cuda:
        # The kernels that take a mask want a key for each query; without them whole scores would be made.
        k, v = _for_each_query(q, k), _for_each_query(q, v)
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=how.dropout, is_causal=seen is None, scale=how.scale, enable_gqa=grouped
    )


def _by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, how: _How) -> torch.Tensor:
    k, v = _for_each_query(q, k), _for_each_query(q, v)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    probs = F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probs, p=how.dropout) @ v


def _for_each_query(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _further(positions: torch.Tensor) -> dict[str, Any]:
    return {"documents": Documents.of(positions)}


def _lacks(asked: Asked) -> str | None:
    return needs_registry(asked) or ("caps no scores" if asked.softcap is not None else None)


DOCUMENTS = Backend(
    name="documents",
    implementation="dtrain_documents",
    lacks=_lacks,
    flat=True,
    further=_further,
    function=_forward_by(_sdpa),
)
"""By torch's scaled_dot_product_attention."""
SCORES = Backend(
    name="document_scores",
    implementation="dtrain_document_scores",
    lacks=needs_registry,
    flat=True,
    further=_further,
    function=_forward_by(_by_hand),
)
"""With a document's scores as a matrix, which can be capped."""
