"""A rank that leaves out a step: the run ends before anything is learned of it, and names the rank."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.comm import TorchComm
from dtrain.errors import DivergedError
from dtrain.plan.world import World
from dtrain.runs import RunDir
from tests.faults.expect import assert_same_result
from tests.faults.harness import Fault, launch
from tests.processes import run_ranks

STEPS, AT = 6, 3


def _leave_out_one() -> None:
    """On rank 1, after it has taken its rows, and without a word: as code does that catches an error there."""
    from dtrain.engine.engine import Engine

    plain = Engine._train_one

    def train_one(self: Engine, loader: Any) -> None:
        state = self._state
        if state.step != AT:
            plain(self, loader)
            return
        loader.window(state.samples)
        self._state = dataclasses.replace(state, step=AT + 1, samples=state.samples + self._course.batch.global_batch)

    if os.environ["RANK"] == "1":
        Engine._train_one = train_one


@pytest.mark.slow
def test_the_run_ends_before_it_learns_and_goes_on(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run, typed = RunDir(folder / "runs" / "out-of-step"), [f"train.steps={STEPS}"]
    ended = launch(folder, run.name, *typed, fault=Fault(before=_leave_out_one))
    assert ended.code == 3, ended.said
    last = ended.err.splitlines()[-1]
    assert f": DivergedError: ranks are not at the same place: rank 0 in train_step < _train_one at step {AT}, " in last
    assert ", rank 1 in " in last
    assert launch(folder, run.name, *typed).code == 0
    assert_same_result(run, whole(STEPS))


def counted(comm: TorchComm, step: int) -> None:
    comm.sum([1.0, 2.0], step=step)


def compared(comm: TorchComm) -> None:
    comm.gather("a digest")


def agreed(comm: TorchComm) -> None:
    comm.max([1.0, 0.0, 0.0])


def ended(comm: TorchComm) -> None:
    comm.barrier()


def _said(calls: list[Callable[[TorchComm], None]]) -> str:
    comm = TorchComm(World.from_env("cpu"))
    counted(comm, 7)
    with pytest.raises(DivergedError) as caught:
        calls[comm.rank](comm)
    return str(caught.value)


_AT = {step: functools.partial(counted, step=step) for step in (7, 8, 9, 10**9, 10**9 - 1)}
# With the sum of their numbers alone 7, 8, 9 would be taken for 8, 8, 8.
ELSEWHERE = [
    ([_AT[8], _AT[8], _AT[9]], "rank 2 in counted < _said at step 9; the others in counted < _said at step 8. "),
    ([_AT[10**9], _AT[10**9 - 1], _AT[10**9]], "rank 1 in counted < _said at step 999999999; the others in "),
    ([_AT[7], _AT[8], _AT[9]], "rank 0 in counted < _said at step 7, rank 1 in counted < _said at step 8, rank 2 in "),
    ([_AT[8], _AT[8], compared], "rank 2 in compared < _said; the others in counted < _said at step 8. "),
    ([agreed, compared, agreed], "rank 1 in compared < _said; the others in agreed < _said. "),
    ([ended, _AT[7], ended], "rank 1 in counted < _said at step 7; the others in ended < _said. "),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "said"), ELSEWHERE)
def test_all_ranks_name_the_one_that_is_elsewhere(calls: list[Callable[[TorchComm], None]], said: str) -> None:
    first, *others = run_ranks(_said, calls, size=3)
    assert others == [first, first]
    assert first.startswith(f"ranks are not at the same place: {said}")
