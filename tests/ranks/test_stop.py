"""What asks one rank to stop or save is done by all, at the same step, wherever they are."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.verify import committed, problems
from dtrain.engine.control import Control
from dtrain.engine.engine import Result, Saving
from dtrain.engine.state import Progress
from tests.contract.small import Recipe, Record, make, make_built, overrides
from tests.processes import run_ranks

STEPS = 6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    make(folder)
    return folder


def typed(small: Path, *more: str) -> list[str]:
    return overrides(small, Recipe(7, steps=STEPS), "strategy=zero2", "eval.every_steps=2", *more)


def saving(built: Any, root: Path, *, every_steps: int = 0, at_end: bool = False) -> Saving:
    from dtrain.checkpoint.saver import Saver

    saver = Saver(root, built.config.checkpoint, built.comm.sibling())
    return Saving(saver, built.describe({}, {"size": built.comm.size}), every_steps, at_end, stop_on_error=True)


def run(built: Any, root: Path, control: Control, record: Record, **when: Any) -> Result:
    return built.engine.run([record], Progress(), saving(built, root, **when), control)


def _in_eval(small: Path, root: Path, options: list[str]) -> tuple[Any, ...]:
    """Rank 1 alone is told to stop within the first eval; then the run goes on."""
    built, record, control = make_built(small, options), Record(), Control()
    objective = built.engine._objective

    def tells(module: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled() and built.comm.rank == 1:
            control.on_signal(signal.SIGUSR1, None)
        return objective(module, batch)

    built.engine._objective = tells
    result = run(built, root, control, record)
    return result, len(record.evals), [report.step for report in record.reports]


def _go_on(small: Path, root: Path, options: list[str]) -> tuple[Any, ...]:
    built, record = make_built(small, options, resume=committed(root)[:1]), Record()
    result = built.engine.run([record], Progress())
    return result, [report.step for report in record.evals], [report.step for report in record.reports]


def test_a_stop_within_an_eval_saves_and_the_eval_is_made_when_the_run_goes_on(small: Path, tmp_path: Path) -> None:
    # 5 held-out rows in windows of 7 are one window; of 2, three.
    options = typed(small, "batch.global_batch=2")
    for result, num_evals, steps in run_ranks(_in_eval, small, tmp_path, options, size=2):
        assert (result.stopped, result.state.step, result.state.eval_step) == ("SIGUSR1", 2, None)
        assert (num_evals, steps) == (0, [1, 2])
    assert [path.name for path in committed(tmp_path)] == ["step-00000002"]
    for result, evals, steps in run_ranks(_go_on, small, tmp_path, options, size=2):
        assert result.stopped is None
        assert (evals, steps) == ([2, 4, 6], [3, 4, 5, 6])


def _before_the_first_step(small: Path, root: Path, options: list[str]) -> Result:
    built, control = make_built(small, options), Control()
    if built.comm.rank == 1:
        control.on_signal(signal.SIGTERM, None)
    return run(built, root, control, Record(), at_end=True)


def test_a_stop_before_the_first_step_saves_nothing(small: Path, tmp_path: Path) -> None:
    for result in run_ranks(_before_the_first_step, small, tmp_path / "none", typed(small), size=2):
        assert (result.stopped, result.state.step) == ("SIGTERM", 0)
    assert committed(tmp_path / "none") == []


def _asked(small: Path, root: Path, trigger: Path, options: list[str]) -> list[str]:
    """Rank 0 looks for the file, and its clock goes a minute a look."""
    built, record = make_built(small, options), Record()
    minutes = iter(range(10**6))
    control = Control(trigger=trigger, clock=lambda: 60.0 * next(minutes)) if built.comm.rank == 0 else Control()
    told = record.note
    lines: list[str] = []
    record.note = lambda line: (lines.append(line), told(line))  # type: ignore[method-assign, func-returns-value]
    run(built, root, control, record)
    return lines


def test_a_file_asks_for_a_save_and_is_gone_then(small: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "SAVE"
    trigger.touch()
    options = typed(small, "checkpoint.keep_last=9")
    for lines in run_ranks(_asked, small, tmp_path / "saves", trigger, options, size=2):
        assert [line.split(":")[0] for line in lines] == ["saved step 1"]
    assert not trigger.exists()
    (folder,) = committed(tmp_path / "saves")
    assert problems(folder) == []


def _by_the_clock(small: Path, root: Path, options: list[str]) -> None:
    built = make_built(small, options)
    now = [0.0]
    clock = Control(every_minutes=2, clock=lambda: now[0]) if built.comm.rank == 0 else Control()
    objective = built.engine._objective

    def a_minute_a_step(module: Any, batch: Any) -> Any:
        now[0] += 15.0 * torch.is_grad_enabled()  # 7 samples on 2 ranks: two micro-batches a step
        return objective(module, batch)

    built.engine._objective = a_minute_a_step
    run(built, root, clock, Record())


def test_a_save_is_due_by_the_clock_of_rank_0(small: Path, tmp_path: Path) -> None:
    options = typed(small, "checkpoint.keep_last=9", "checkpoint.async=false")
    run_ranks(_by_the_clock, small, tmp_path, options, size=2)
    # Half a minute a step, two minutes a save.
    assert [path.name for path in committed(tmp_path)] == ["step-00000004"]


def _out_of_time(small: Path, root: Path, options: list[str]) -> Result:
    built = make_built(small, options)
    now = [0.0]
    # A limit of 60 s, of which 20 s and twice a step and a save are kept.
    clock = Control(time_left_s=60, clock=lambda: now[0]) if built.comm.rank == 0 else Control()
    objective = built.engine._objective

    def slow(module: Any, batch: Any) -> Any:
        now[0] += 10.0 * torch.is_grad_enabled()
        return objective(module, batch)

    built.engine._objective = slow
    return run(built, root, clock, Record())


def test_the_time_limit_stops_it_before(small: Path, tmp_path: Path) -> None:
    for result in run_ranks(_out_of_time, small, tmp_path, typed(small), size=2):
        assert result.stopped == "the time limit is near"
        assert result.state.step == 2  # 20 s a step: after two, 20 s are left and a little more is kept
    assert [path.name for path in committed(tmp_path)] == ["step-00000002"]
