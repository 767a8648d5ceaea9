"""A loss that leaps ends a run before the update, and the run goes on without those rows: as one plain process does that
never saw them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.saver import Saver
from dtrain.engine.engine import LEAST_RECENT, Saving
from dtrain.engine.state import Progress
from dtrain.errors import LeapError
from tests.contract.small import Recipe, Record, make_built, overrides, reference
from tests.contract.test_equivalence import difference
from tests.processes import run_ranks

RECIPE = Recipe(6, steps=14, lr=1e-4)
SAVED = 4


class Part(NamedTuple):
    """Of a run, as one rank saw it."""

    error: str
    losses: dict[int, float]
    weights: dict[str, np.ndarray]
    notes: list[str]


def _part(small: Path, typed: list[str], root: Path, *, resume: Path | None = None) -> Part:
    built, record, error = make_built(small, typed, resume=[] if resume is None else [resume]), Record(), ""
    saver = Saver(root, built.config.checkpoint, built.comm.sibling())
    saving = Saving(saver, built.describe({}, {"size": built.comm.size}), SAVED, at_end=False, stop_on_error=True)
    try:
        built.engine.run([record], Progress(), saving)
    except LeapError as leap:
        error = str(leap)
    weights = {name: full.numpy().copy() for name, full in built.strategy.full_state()}
    return Part(error, {one.step: one.loss for one in record.reports}, weights, record.notes)


def _both(small: Path, typed: list[str], root: Path, step: int) -> tuple[Part, Part, Part]:
    """Up to the leap; on from the save before it, without it; and on from a save after it."""
    first = _part(small, typed, root)
    saved, last = (root / folder_name(done // SAVED * SAVED) for done in (step - 1, RECIPE.steps))
    rest = _part(small, [*typed, f"train.leave_out=[{step}]"], root, resume=saved)
    again = _part(small, [*typed, f"train.leave_out=[2,{step}]"], root, resume=last)
    return first, rest, again


@functools.cache
def _plain(small: Path) -> tuple[int, float, list[float], dict[str, np.ndarray]]:
    """The step with the largest leap, one that only that step makes, the losses, and the weights before that step."""
    losses = reference(small, RECIPE).losses
    leaps = {i + 1: losses[i] - float(np.mean(losses[:i])) for i in range(LEAST_RECENT, RECIPE.steps)}
    second, most = sorted(leaps.values())[-2:]
    assert most > 0
    step = max(leaps, key=leaps.__getitem__)
    before: dict[str, np.ndarray] = {}

    def after(done: int, model: Any, optimizer: Any) -> None:
        if done == step - 1:
            before.update({name: param.detach().numpy().copy() for name, param in model.named_parameters()})

    reference(small, RECIPE, after)
    return step, (most + max(second, 0.0)) / 2, losses, before


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("zero3", 2), ("fsdp2", 1)])
def test_a_leap_is_not_learned_from_and_its_rows_can_be_left_out(
    small: Path, tmp_path: Path, strategy: str, size: int
) -> None:
    step, leap, losses, before = _plain(small)
    without = reference(small, RECIPE, leave_out=[step])
    assert losses[step:] != pytest.approx(without.losses[step - 1 :], rel=1e-5), "it matters"
    typed = overrides(small, RECIPE, f"strategy={strategy}", f"train.max_leap={leap}")
    for first, rest, again in run_ranks(_both, small, typed, tmp_path, step, size=size):
        assert list(first.losses) == list(range(1, step))
        assert list(first.losses.values()) == pytest.approx(losses[: step - 1], rel=1e-5)
        assert f"the loss is {losses[step - 1]:.4f}, more than train.max_leap=" in first.error
        assert f"above {np.mean(losses[: step - 1]):.4f}, the mean of the {step - 1} steps before" in first.error
        assert f"with train.leave_out=[{step}] goes on without the rows of step {step}. Nothing was up" in first.error
        assert "the highest of a micro-batch is " in first.error
        for name, weight in before.items():
            assert difference(first.weights[name], weight) < 1e-5, name
        assert (rest.error, again.error) == ("", "")
        done = (step - 1) // SAVED * SAVED
        assert list(rest.losses) == [i for i in range(done + 1, RECIPE.steps + 1) if i != step]
        assert list(rest.losses.values()) == pytest.approx(without.losses[done:], rel=1e-5)
        assert any(line.startswith(f"step {step}: left out, ") for line in rest.notes)
        assert not any("learned from before" in line for line in rest.notes)
        for name, weight in without.weights.items():
            assert difference(rest.weights[name], weight) < 1e-5, name
            assert difference(again.weights[name], weight) < 1e-5, name
        assert any(line.startswith("train.leave_out=[2]: learned from before step 12") for line in again.notes)
