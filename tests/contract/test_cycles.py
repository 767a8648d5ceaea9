"""Saved and gone on with a hundred times: the same weights as in one run, and nothing grows."""

from __future__ import annotations

import dataclasses
import gc
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.saver import Saver
from dtrain.comm import TorchComm
from dtrain.config.schema import Config
from dtrain.engine.control import Control
from dtrain.engine.engine import Saving
from dtrain.engine.state import Progress
from dtrain.plan.world import World
from tests.contract.small import Recipe, Record, make_built, overrides, settled, train
from tests.processes import run_ranks

CYCLES, KEPT = 100, 3
RECIPE = Recipe(7, steps=CYCLES)


@dataclasses.dataclass
class Cycles:
    losses: list[float]
    weights: dict[str, np.ndarray]
    left: list[list[str]]
    """What was on disk after each cycle."""
    held: list[tuple[int, int, int]]
    """Open files, threads, and bytes of memory of its own after each cycle."""


def _cycles(folder: Path, config: Config, root: Path) -> Cycles:
    """One step at a time: build, load, train, save, stop."""
    comm = TorchComm(World.from_env("cpu"))
    beside = comm.sibling()
    done = Cycles([], {}, [], [])
    for step in range(CYCLES):
        start = [root / folder_name(step)] if step else []
        built, record, control = make_built(folder, config, resume=start), Record(), Control()
        built.engine._objective = _stopping(built.engine._objective, control)
        saving = Saving(Saver(root, config.checkpoint, beside), built.describe({}, {"size": comm.size}), every_steps=0,
                        at_end=True, stop_on_error=True)  # fmt: skip
        built.engine.run([record], Progress(), saving, control)
        done.losses += [report.loss for report in record.reports]
        done.weights = {name: full.numpy() for name, full in built.strategy.full_state()}
        del built, saving, control
        gc.collect()
        done.left.append(sorted(path.name for path in root.iterdir()))
        done.held.append((len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), _own_bytes()))
    return done


def _stopping(objective: Any, control: Control) -> Any:
    def stopping(module: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            control.on_signal(signal.SIGTERM, None)
        return objective(module, batch)

    return stopping


def _own_bytes() -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what a process holds in /proc")
@pytest.mark.parametrize(("strategy", "size"), [("fsdp2", 1), ("ddp", 2)])
def test_a_hundred_times(small: Path, tmp_path: Path, strategy: str, size: int) -> None:
    typed = overrides(small, RECIPE, f"strategy={strategy}", f"checkpoint.keep_last={KEPT}")
    through = run_ranks(train, small, typed, size=size)[0]
    for cycles in run_ranks(_cycles, small, settled(typed), tmp_path, size=size):
        assert cycles.losses == through.losses
        for name, weight in through.weights.items():
            np.testing.assert_array_equal(cycles.weights[name], weight, err_msg=name)
        for step, names in enumerate(cycles.left, 1):
            assert names == ["latest", *(folder_name(i) for i in range(max(1, step - KEPT + 1), step + 1))]
        # The first cycles fill caches. One whole state kept in each of the others would be 5 % of the memory.
        early, late = np.array(cycles.held[10:20]).max(axis=0), np.array(cycles.held[-10:]).max(axis=0)
        assert (late <= 1.05 * early).all(), (early, late)
