"""Checkpoints made without a run: any tensors, divided over ranks as one likes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import Manifest, Parameter, folder_name
from dtrain.checkpoint.storage import file_name, parts, write_file
from dtrain.strategies.base import Shard

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""By parameter and state."""
STATES = ("weight", "exp_avg", "exp_avg_sq")


def tensors(shapes: Mapping[str, tuple[int, ...]], *, states: Sequence[str] = STATES, seed: int = 0) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: {state: torch.randn(shape, generator=draw) for state in states} for name, shape in shapes.items()}


def shards(of: Tensors, cuts: Sequence[int], *, replicas: int = 1) -> list[list[Shard]]:
    """For each rank its shards, where all parameters one after the other are cut at these elements."""
    total = sum(math.prod(one["weight"].shape) for one in of.values())
    edges = [0, *sorted(cuts), total]
    found: list[list[Shard]] = []
    for begin, end in itertools.pairwise(edges):
        mine, at = [], 0
        for name, states in of.items():
            numel = states["weight"].numel()
            first, last = max(begin, at), min(end, at + numel)
            if first < last:
                views = {state: whole.reshape(-1)[first - at : last - at] for state, whole in states.items()}
                mine.append(Shard(name, tuple(states["weight"].shape), first - at, views))
            at += numel
        found += [[dataclasses.replace(one, replica=i, replicas=replicas) for one in mine] for i in range(replicas)]
    return found


def describe(of: Tensors, step: int, **said: Any) -> Manifest:
    """A manifest that lacks only its files."""
    parameters = {name: Parameter(tuple(states["weight"].shape), tuple(states), name) for name, states in of.items()}
    fields: dict[str, Any] = {
        "progress": {"step": step, "samples": 8 * step}, "counters": {"updates": float(step)}, "parameters": parameters,
        "tied": {}, "metrics": {"loss": 1 / step if step else 9.0}, "identity": {"optim.lr": 0.1, "data": "abc"},
        "config": {"train": {"steps": 100}, "export": {"dtype": "fp32"}},
        "made_by": {"name": "r", "strategy": "some", "size": 2, "time": "2030-01-02T03:04:05.678Z", "attempt": 0},
    }  # fmt: skip
    return Manifest(step=step, **{**fields, **said})


def write(root: Path, step: int, of: Tensors, *, cuts: Sequence[int] = (), replicas: int = 1,
          blobs: Mapping[str, bytes] | None = None, **said: Any) -> Path:  # fmt: skip
    """The checkpoint of that step under `root`, a file for each rank."""
    folder = root / folder_name(step)
    folder.mkdir(parents=True)
    order = {name: i for i, name in enumerate(of)}
    files = {file_name(rank): write_file(folder / file_name(rank), parts(mine, order), blobs or {})
             for rank, mine in enumerate(shards(of, cuts, replicas=replicas))}  # fmt: skip
    whole = dataclasses.replace(describe(of, step, **said), files=files)
    (folder / manifest.NAME).write_bytes(manifest.dump(whole))
    return folder
