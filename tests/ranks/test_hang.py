"""Ranks that do not get on, under real torchrun: found in time, the right one named, nothing left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dtrain.config.spec import Command
from dtrain.launchers._processes import marked
from dtrain.launchers.local import Local
from dtrain.launchers.supervise import supervise
from dtrain.launchers.verdict import explain
from dtrain.plan.world import Topology
from dtrain.runs import Outcome, RunDir
from dtrain.runs.hang import read_hang
from tests import measured

RANK = str(Path(__file__).with_name("_hanging.py"))
LIMIT_S = 3.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "a run")
    made.path.mkdir()
    return made


def supervised(run: RunDir, what: str, limit_s: float = LIMIT_S) -> Outcome:
    made = Local().command(run.path, ["HERE"], Topology(nodes=1, procs_per_node=2))
    command = Command([*made.argv[:-3], RANK, what], made.env)
    outcome = supervise(command, run, run.new_attempt(), note=lambda line: None, hang_after=limit_s)
    assert marked(run.path) == []
    return outcome


@pytest.mark.parametrize(("what", "told"), [
    ("spin", "_hanging.py:"), ("sleep", "_hanging.py:"), ("halt", "its process is halted (SIGSTOP)"),
])  # fmt: skip
def test_the_rank_that_stands_still_is_named(run: RunDir, what: str, told: str) -> None:
    began = time.monotonic()
    outcome = supervised(run, what)
    assert time.monotonic() - began < 200  # of which most is importing torch; what is learned is 300 s at least
    assert (outcome.kind, outcome.exit_code, outcome.step) == ("hang", 3, 5)
    failure = outcome.failure
    assert (failure.rank, failure.phase, failure.step, failure.rows) == (1, "train", 5, (7,))
    found_s = max(one.stale_s for one in read_hang(run, 0))
    assert LIMIT_S <= found_s < LIMIT_S + 30
    measured.detected(found_s)
    assert told in failure.message
    last = explain(outcome, run).splitlines()[-1]
    assert last.startswith("rank 1 on ")
    assert "in train at step 5: hang: no rank got on for " in last
    stacks = (run.hang_dir(0) / "rank-1.txt").read_text()
    assert what == "halt" or "_hanging.py" in stacks  # one that is halted shows none, but to py-spy
    assert "all_reduce" in (run.hang_dir(0) / "rank-0.txt").read_text()
    assert str(run.hang_dir(0) / "rank-1.txt") in last


def test_what_is_only_slow_ends_well(run: RunDir) -> None:
    assert supervised(run, "slow", limit_s=15.0).kind == "done"
    assert not run.hang_dir(0).exists()
