"""One rank is told to stop, whatever it is doing: all of them stop at one place, and the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from tests.faults.expect import assert_same_result, steps_of
from tests.faults.harness import Fault, launch

STOPPED = 75


@pytest.mark.parametrize(("where", "code", "saved"), [
    ("at.init:term", STOPPED, []),
    ("at.eval:term", STOPPED, [2, 1]),
    ("at.save:term:after=1", STOPPED, [3, 2]),  # the second save; the step after it is the last one
    ("at.export:term:times=1", 0, [4, 3]),
])  # fmt: skip
def test_told_to_stop(folder: Path, whole: Callable[..., RunDir], where: str, code: int, saved: list[int]) -> None:
    name = f"told-{where.split(':')[0]}"
    typed = ("train.steps=4", "checkpoint.async=false", "eval.every_steps=2")
    told = launch(folder, name, *typed, fault=Fault(fail=f"{where}:rank=1"))
    run = RunDir(folder / "runs" / name)
    assert told.code == code, told.said
    assert steps_of(run)[: len(saved)] == saved
    if code == STOPPED:
        assert run.read_outcome().reason == "SIGTERM"
        again = launch(folder, name, *typed)
        assert again.code == 0, again.said
    assert_same_result(run, whole(4))
