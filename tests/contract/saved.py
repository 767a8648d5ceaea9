"""Runs that save, and runs that go on from what was saved, with all that is to be compared of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.saver import Saved, Saver
from dtrain.config.schema import Config
from dtrain.engine.engine import Saving
from dtrain.engine.state import Progress
from dtrain.strategies.base import Shard
from tests.contract.small import Record, make_built

Whole = dict[str, dict[str, np.ndarray]]
"""By state (`weight` and the optimizer's), then by parameter."""


@dataclasses.dataclass
class Piece:
    """A shard, copied."""

    name: str
    shape: tuple[int, ...]
    start: int
    views: dict[str, np.ndarray]


@dataclasses.dataclass
class Ran:
    """What one rank saw of a run."""

    losses: list[float]
    norms: list[float]
    ids: list[list[int]]
    """The rows that its forwards were given in each step."""
    first: list[Piece]
    """Before the first step."""
    saved: list[Piece]
    """When it was first saved; empty where it was not."""
    last: list[Piece]


def run(
    folder: Path, config: Config, root: Path, start: Path | None, *, noise: bool, in_background: bool = True
) -> Ran:
    """Train with dtrain's own engine and saver, from the checkpoint `start` on; call it on every rank.

    `root`: for checkpoints. `noise`: the loss hangs on Python's and numpy's generators, as an objective's may.
    `in_background`: steps go on while a save is written, and one that is due meanwhile is put off.
    """
    built = make_built(folder, config, resume=[] if start is None else [start])
    first = copies(built.strategy.shards())
    watch = _Watch(built.engine._objective, noise=noise)
    built.engine._objective = watch.objective
    policy = config.checkpoint
    saver = _Copying(Saver(root, policy, built.comm.sibling()), in_background=in_background)
    saving = Saving(saver, built.describe({}, {"size": built.comm.size}), policy.every_steps, policy.at_end, True)
    built.engine.run([watch], Progress(), saving)
    return Ran([r.loss for r in watch.reports], [r.grad_norm for r in watch.reports], watch.ids, first, saver.pieces,
               copies(built.strategy.shards()))  # fmt: skip


class _Watch(Record):
    """A tracker that knows which rows were trained on, because it sees what the objective is given."""

    def __init__(self, objective: Any, *, noise: bool) -> None:
        super().__init__()
        self._objective, self._noise = objective, noise
        self._given: list[int] = []
        self.ids: list[list[int]] = []

    def objective(self, module: Any, batch: Any) -> Any:
        loss = self._objective(module, batch)
        if not torch.is_grad_enabled():
            return loss
        self._given += batch.sample_ids
        factor = 1 + random.random() / 8 + np.random.random() / 8 if self._noise else 1.0
        return dataclasses.replace(loss, total=loss.total * factor)

    def step(self, report: Any) -> None:
        super().step(report)
        self.ids.append(self._given)
        self._given = []


class _Copying:
    """A saver that keeps a copy of what it was first given."""

    def __init__(self, saver: Saver, *, in_background: bool) -> None:
        self._saver, self._in_background = saver, in_background
        self.pieces: list[Piece] = []

    @property
    def busy(self) -> bool:
        return self._saver.busy

    @property
    def failed(self) -> bool:
        return self._saver.failed

    def save(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None:
        given = list(shards)
        self.pieces = self.pieces or copies(given)
        self._saver.save(given, what, blobs)
        if not self._in_background:
            self._saver.wait()

    def finished(self) -> Saved | None:
        return self._saver.finished()

    def wait(self) -> None:
        self._saver.wait()


def copies(shards: Iterable[Shard]) -> list[Piece]:
    return [Piece(s.name, s.shape, s.start, {key: view.detach().cpu().numpy().copy() for key, view in s.views.items()})
            for s in shards]  # fmt: skip


def whole(ranks: Iterable[list[Piece]]) -> Whole:
    """Every tensor, put together from what the ranks own. Ranks that own the same must have the same."""
    found: Whole = {}
    filled: dict[tuple[str, str], np.ndarray] = {}
    for piece in (one for pieces in ranks for one in pieces):
        for state, view in piece.views.items():
            numel = int(np.prod(piece.shape))
            flat = found.setdefault(state, {}).setdefault(piece.name, np.empty(piece.shape, np.float32)).reshape(-1)
            done = filled.setdefault((state, piece.name), np.zeros(numel, bool))
            span = slice(piece.start, piece.start + len(view))
            assert np.array_equal(flat[span][done[span]], view[done[span]]), f"{state} of {piece.name}: replicas differ"
            flat[span], done[span] = view, True
    missing = [key for key, done in filled.items() if not done.all()]
    assert not missing, missing
    return found


def rows_of(ranks: Iterable[Ran]) -> list[list[int]]:
    """What all ranks together were given in each step, in the order of the ranks."""
    return [[i for given in step for i in given] for step in zip(*(ran.ids for ran in ranks), strict=True)]
