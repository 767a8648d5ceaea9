"""Clocks that jump, and files whose times lie."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from dtrain.checkpoint.verify import committed
from dtrain.errors import RunError
from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.expect import assert_same_result, steps_of
from tests.faults.harness import Fault, launch

pytestmark = pytest.mark.slow

STEPS = 8
REAL = time.time


def jumped(by_s: float) -> Callable[[], float]:
    return lambda: REAL() + by_s


def _jumps() -> None:
    """An hour back, a day forth, at every look."""
    plain, leaps = time.time, itertools.cycle([-3600.0, 86400.0, -172800.0])
    time.time = lambda: plain() + next(leaps)


def test_steps_decide_not_times(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run = RunDir(folder / "runs" / "clocks")
    typed = [f"train.steps={STEPS}", "checkpoint.async=false", "checkpoint.keep_last=3"]
    killed = launch(folder, run.name, *typed, fault=Fault(fail="ckpt.stage:kill:after=5", before=_jumps))
    assert killed.code == 3, killed.said
    assert steps_of(run) == [5, 4, 3]
    for years, path in enumerate(committed(run.checkpoints)):  # the newest is the oldest by its time
        os.utime(path, (years * 3e7, years * 3e7))
        os.utime(path / "manifest.json", (years * 3e7, years * 3e7))
    with mock.patch("time.time", jumped(-1e8)):
        ended = launch(folder, run.name, *typed, fault=Fault(before=_jumps))
    assert ended.code == 0, ended.said
    assert f"going on from {run.checkpoints / 'step-00000005'}" in ended.out
    assert steps_of(run) == [8, 7, 6]
    assert_same_result(run, whole(STEPS))
    for row in rows(run.path / "metrics.jsonl"):
        assert 0 < row["step_s"] < 60
    saved = [event for event in rows(run.events) if event["kind"] == "saved"]
    assert all(0 < event["write_s"] < 60 and 0 <= event["pause_s"] < 60 for event in saved)


@pytest.mark.parametrize("jump_s", [-1e8, 1e8])
def test_a_lock_is_not_stolen_when_the_clock_jumps(tmp_path: Path, jump_s: float) -> None:
    run = RunDir(tmp_path / "run")
    with (
        run.lock(),
        mock.patch("time.time", jumped(jump_s)),
        pytest.raises(RunError, match="in use by process"),
    ):
        run.lock().__enter__()


@pytest.mark.parametrize("jump_s", [-1e8, 0, 1e8])
def test_nor_is_one_of_another_host_that_is_alive(tmp_path: Path, jump_s: float) -> None:
    """All that this host sees of it is when its file was touched."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    lock = run.path / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": f"not-{socket.gethostname()}", "started": 1.0, "since": "then"}))
    notes: list[str] = []
    with mock.patch("time.time", jumped(jump_s)):
        with pytest.raises(RunError, match="in use by process 1 on not-"):
            run.lock().__enter__()
        os.utime(lock, (REAL() - 600, REAL() - 600))
        with run.lock(note=notes.append):
            pass
    assert len(notes) == 1
    assert "which is gone; taken over" in notes[0]
