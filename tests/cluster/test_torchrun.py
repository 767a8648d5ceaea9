"""The same command typed twice, as on two machines that share a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from dtrain.runs.hang import read_hang
from tests import measured
from tests.e2e.command import ROOT, SMALL, dtrain, write_texts

TYPED = [*SMALL, "dataset.path=texts.jsonl", "launcher=torchrun", "launcher.procs=1", "strategy=ddp",
         "launcher.join_timeout_s=60"]  # fmt: skip
ENDLESS = ["train.steps=100000", "eval.every_steps=0", "checkpoint.every_minutes=null"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / 'a b\'s "folder" $(touch x)'
    made.mkdir()
    write_texts(made / "texts.jsonl")
    return made


@pytest.fixture
def machines(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for one in started:
        one.kill()
        one.wait()


def start(machines: list[subprocess.Popen[str]], folder: Path, *typed: str) -> RunDir:
    """On both; returns once rank 0 has trained a step or the commands have ended."""
    for number in range(2):
        with (folder / f"out-{number}").open("w") as out:
            machines.append(
                subprocess.Popen([sys.executable, "-m", "dtrain", "launch", *TYPED, *typed], cwd=folder, text=True,
                                 stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                 env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
            )  # fmt: skip
    run = RunDir(folder / "runs" / "demo")
    while not run.metrics.exists() and any(one.poll() is None for one in machines):
        time.sleep(0.05)
    return run


def ended(machines: list[subprocess.Popen[str]], folder: Path, within_s: float = 120) -> tuple[list[int], str]:
    deadline = time.monotonic() + within_s
    codes = [one.wait(max(0.1, deadline - time.monotonic())) for one in machines]
    return codes, "".join((folder / f"out-{number}").read_text() for number in range(2))


def losses(run: RunDir) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


def test_two_machines_train_as_one(folder: Path, machines: list[subprocess.Popen[str]]) -> None:
    run = start(machines, folder)
    codes, said = ended(machines, folder)
    assert codes == [0, 0], said
    assert {path.name for path in run.attempt_dir(0).glob("launcher*")} == {"launcher.log", "launcher-1.log"}
    assert list(run.nodes.iterdir()) == []
    assert run.read_manifest()["topology"] == {"nodes": 2, "procs_per_node": 1}
    one = [word for word in TYPED if not word.startswith("launcher")]
    alone = dtrain(folder, "launch", *one, "launcher.procs=2", "run.name=one-machine")
    assert alone.returncode == 0, alone.stderr
    assert losses(run) == losses(RunDir(folder / "runs" / "one-machine"))
    assert not (folder / "x").exists()


def rank_1(run: RunDir) -> int:
    """Its process, and whether it is the second machine's: torchrun numbers the machines by their names."""
    import psutil

    for process in psutil.process_iter():
        try:
            env = process.environ()
        except psutil.Error:
            continue
        if env.get("DTRAIN_RUN") == str(run.path) and env.get("RANK") == "1":
            return process.pid
    raise AssertionError("rank 1 is not running")


def test_a_killed_rank_ends_both_and_is_named(folder: Path, machines: list[subprocess.Popen[str]]) -> None:
    run = start(machines, folder, *ENDLESS)
    os.kill(rank_1(run), signal.SIGKILL)
    killed = time.monotonic()
    codes, said = ended(machines, folder)
    assert codes == [3, 3], said
    took_s = time.monotonic() - killed
    assert took_s < 60  # torchrun itself would wait for the others for five minutes
    measured.detected(took_s)
    assert "rank 1 on " in said
    assert "killed by SIGKILL" in said


def test_a_signal_to_one_machine_stops_both(folder: Path, machines: list[subprocess.Popen[str]]) -> None:
    run = start(machines, folder, *ENDLESS)
    machines[1].send_signal(signal.SIGTERM)
    codes, said = ended(machines, folder)
    assert codes == [75, 75], said
    assert run.read_outcome().reason == "SIGTERM"
    assert list(run.checkpoints.glob("step-*"))


def test_after_a_failure_all_meet_anew(
    folder: Path, machines: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_FAIL", "train.forward:kill:rank=1:after=5")
    run = start(machines, folder, "eval.every_steps=0", "checkpoint.every_steps=2", "checkpoint.async=false",
                "launcher.max_restarts=1", "launcher.restart_wait_s=0.1")  # fmt: skip
    codes, said = ended(machines, folder)
    assert codes == [0, 0], said
    assert [(one["ended"], one["first_step"]) for one in run.read_manifest()["attempts"]] == [
        ("worker", 0),
        ("done", 4),
    ]
    assert list(run.nodes.iterdir()) == []
    assert len(losses(run)) == 8


def test_ranks_of_both_are_looked_at_where_one_stands_still(
    folder: Path, machines: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_FAIL", "train.forward:sleep=1000:rank=1:after=3")
    run = start(machines, folder, *ENDLESS, "run.hang_after=4")
    codes, said = ended(machines, folder)
    assert codes == [3, 3], said
    outcome = run.read_outcome()
    assert (outcome.kind, outcome.failure.rank, outcome.failure.step) == ("hang", 1, 3), said
    assert [one.place.rank for one in read_hang(run, 0)] == [0, 1]
    assert {path.name for path in run.hang_dir(0).glob("node-*.json")} == {"node-0.json", "node-1.json"}
