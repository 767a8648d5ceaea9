"""A run that fails is started again by the command itself, as often as it was allowed to and gets on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dtrain.runs import RunDir
from tests.faults.expect import assert_same_result
from tests.faults.harness import Fault, launch

AGAIN = ("train.steps=8", "checkpoint.async=false", "launcher.max_restarts=3", "launcher.restart_wait_s=0.05")


def ends(run: RunDir) -> list[str]:
    return [one["ended"] for one in run.read_manifest()["attempts"]]


def test_a_rank_that_is_killed_again_and_again(folder: Path, whole: Callable[..., RunDir]) -> None:
    # Four samples on two ranks, one micro-batch a step: each attempt gets three steps far.
    fault = Fault(fail="train.forward:kill:rank=1:after=3")
    ended = launch(folder, "restarted", *AGAIN, fault=fault)
    run = RunDir(folder / "runs" / "restarted")
    assert ended.code == 0, ended.said
    assert ends(run)[-1] == "done"
    assert set(ends(run)[:-1]) == {"worker"}
    assert "start 1 after a failure (worker) in 0 s" in ended.out
    assert_same_result(run, whole(8))


def test_one_that_never_gets_on_is_not_started_a_third_time(folder: Path) -> None:
    ended = launch(folder, "stuck", *AGAIN, fault=Fault(fail="train.forward:kill:rank=0"))
    assert ended.code == 3
    assert ends(RunDir(folder / "runs" / "stuck")) == ["worker", "worker"]
    assert "not started again: two attempts in a row began at step 0 and failed: no progress" in ended.out
