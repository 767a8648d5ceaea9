"""How likely a model finds rows: the loss of each document of them, and of labels after a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from dtrain.comm import AbstractComm
from dtrain.data.collate import collate
from dtrain.data.rows import Row
from dtrain.objectives.base import Around
from dtrain.plan.batch import BatchPlan

if TYPE_CHECKING:
    from dtrain.config.spec import ObjectiveSpec
    from dtrain.data.batch import Batch
    from dtrain.data.store import AbstractStore
    from dtrain.engine.loaded import Loaded

_TOGETHER_TOKENS = 16384
"""Of one forward."""


class Document(NamedTuple):
    """Of a row, where the objective's targets are tokens; else the row itself."""

    row: int
    document: int | None
    loss: float
    """Sum over the targets."""
    num_targets: int
    extras: Mapping[str, torch.Tensor] = {}
    """What the objective tells besides: sums over the targets, flattened."""


def documents(module: nn.Module, rows: Iterable[tuple[int, Row]], pad_id: int,
              device: torch.device) -> Iterator[Document]:  # fmt: skip
    """The loss of each, from the log-probability of every target: by the head that training uses, without logits."""
    for i, row in rows:
        sums = log_probs(module, [row], pad_id, device)
        counts = np.add.reduceat(row.targets, _starts(row), dtype=np.int64)
        for k, (value, num) in enumerate(zip(sums, counts.tolist(), strict=True)):
            yield Document(i, k, -value, num)


def whole_rows(objective: ObjectiveSpec, num_rows: int, around: Around) -> Iterator[Document]:
    """The same of objectives whose targets are more than tokens, over the first rows of `around`: a global batch at a
    time, since some losses look at all rows of one. Raises what `around.copy` does.
    """
    spec: Any = objective
    if "reference" in {field.name for field in dataclasses.fields(spec)}:
        # The starting weights are a model of their own here, whatever way the run had to them.
        objective = dataclasses.replace(spec, reference="copy")
    loss_of, make = objective.build(), objective.collator() or collate
    before, store = objective.begin(around), around.rows[1]
    for first in range(0, num_rows, around.batch.global_batch):
        ids = range(first, min(num_rows, first + around.batch.global_batch))
        batches: Sequence[Batch] = [make([store.row(i)], [i], around.pad_id).to(around.comm.device) for i in ids]
        with torch.no_grad():
            if before is not None:
                batches = before(batches, held_out=True)
            for i, batch in zip(ids, batches, strict=True):
                loss = loss_of(around.module, batch)
                extras = {name: value.double().reshape(-1).cpu() for name, value in loss.extras.items()}
                yield Document(i, None, float(loss.total), loss.num_targets, extras)


def alone(module: nn.Module, store: AbstractStore, loaded: Loaded, *, pad_id: int, global_batch: int,
          copy: Callable[[], nn.Module]) -> Around:  # fmt: skip
    """What an objective may ask for, with one process and these rows. `copy`: gives the model that training started
    from, or raises why there is none.
    """

    def no_digest() -> str:
        raise AssertionError("nothing is kept here that a digest would name")

    return Around(
        module=module, comm=_Alone(loaded.device), base=None, copy=copy, rows=(store, store),
        batch=BatchPlan(global_batch, 1, 1), pad_id=pad_id, assets=loaded.folder, start=no_digest, cache=loaded.folder,
        resumed=True, say=lambda line: None, at=lambda rows: None,
    )  # fmt: skip


@final
class _Alone(AbstractComm):
    """Of one process, which has nobody to talk to."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device

    def sum(self, values: Sequence[float], *, step: int | None = None) -> list[float]:
        return list(values)

    def max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: str) -> list[str]:
        return [value]

    def sibling(self) -> AbstractComm:
        return self

    def barrier(self) -> None:
        """Nobody is waited for."""


def log_probs(module: nn.Module, rows: Sequence[Row], pad_id: int, device: torch.device) -> list[float]:
    """Of each document of these rows, in order, the sum over its targets."""
    batch = collate(rows, range(len(rows)), pad_id).to(device)
    with torch.no_grad():
        each = module(**batch.inputs, each=True).double().cpu().numpy()
    counts = np.concatenate([np.add.reduceat(row.targets, _starts(row), dtype=np.int64) for row in rows])
    ends = np.cumsum(counts)
    return [float(each[end - num : end].sum()) for num, end in zip(counts.tolist(), ends.tolist(), strict=True)]


def likeliest(module: nn.Module, labelled: Mapping[str, Row], pad_id: int, device: torch.device) -> dict[str, float]:
    """The log-probability of each label with the token that ends it; `labelled`: the same text with each."""
    scores: list[float] = []
    rows = list(labelled.values())
    each = max(1, _TOGETHER_TOKENS // max(len(row.tokens) for row in rows))
    for start in range(0, len(rows), each):
        scores += log_probs(module, rows[start : start + each], pad_id, device)
    return dict(zip(labelled, scores, strict=True))


def _starts(row: Row) -> np.ndarray:
    return np.cumsum(row.lengths, dtype=np.int64) - row.lengths
