"""A run that is told to stop saves and ends with 75; the same command again gives what one run without a stop gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import measured
from tests.e2e.command import ROOT, SMALL, dtrain, rows, workers_of, write_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left processes in /proc"),
]

STEPS = 60
LONG = [*SMALL, f"train.steps={STEPS}", "eval.every_steps=0", "dataset.path=texts.jsonl", "launcher.procs=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stop")
    write_texts(path / "texts.jsonl")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict]:
    """The metrics of a run that nobody stopped."""
    done = dtrain(folder, "launch", "strategy=zero2", "run.name=whole", *LONG)
    assert done.returncode == 0, done.stderr
    return rows(folder / "runs" / "whole" / "metrics.jsonl")


def interrupted(folder: Path, name: str, then: Callable[[subprocess.Popen], None], *more: str) -> tuple[int, str]:
    """Exit code and stderr of a run to which `then` is done once it trains."""
    slowly = "train.forward:sleep=0.2:attempt=0"  # it is not to be done before it is told
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DTRAIN_FAIL": slowly}
    argv = [sys.executable, "-m", "dtrain", "launch", f"run.name={name}", *LONG, *more]
    process = subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    then(process)
    told_at = time.monotonic()
    _, said = process.communicate(timeout=120)
    measured.detected(time.monotonic() - told_at)
    assert workers_of(folder / "runs" / name) == []
    return process.returncode, said


def columns(metrics: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in metrics]


def outcome(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "outcome.json").read_text())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_goes_on(folder: Path, whole: list[dict], signum: int) -> None:
    name = signal.Signals(signum).name
    code, said = interrupted(folder, name, lambda process: process.send_signal(signum), "strategy=zero2")
    assert code == 75, said
    assert "goes on from its newest checkpoint" in said.splitlines()[-1]
    assert "Traceback" not in said
    stopped_at = outcome(folder, name)["step"]
    assert 3 <= stopped_at < STEPS
    again = dtrain(folder, "launch", "strategy=zero2", f"run.name={name}", *LONG)
    assert again.returncode == 0, again.stderr
    assert f"going on from {folder / 'runs' / name / 'checkpoints'}/step-{stopped_at:08d}" in again.stdout
    metrics = rows(folder / "runs" / name / "metrics.jsonl")
    # To the last bit: the same strategy on the same number of ranks.
    exact = ("step", "loss", "grad_norm", "lr", "tokens", "samples")
    assert columns(metrics, *exact) == columns(whole, *exact)
    manifest = json.loads((folder / "runs" / name / "manifest.json").read_text())
    assert [(one["first_step"], one["ended"]) for one in manifest["attempts"]] == [(0, "stopped"), (stopped_at, "done")]


def test_a_signal_to_one_rank_stops_all_and_another_strategy_goes_on(folder: Path, whole: list[dict]) -> None:
    def tell_rank_1(process: subprocess.Popen) -> None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.environ().get("RANK") == "1":
                child.send_signal(signal.SIGUSR1)
                return
        raise AssertionError("no rank 1")

    code, said = interrupted(folder, "one-rank", tell_rank_1, "strategy=ddp")
    assert code == 75, said
    again = dtrain(folder, "launch", "strategy=fsdp2", "run.name=one-rank", *LONG, "launcher.procs=3")
    assert again.returncode == 0, again.stderr
    metrics = rows(folder / "runs" / "one-rank" / "metrics.jsonl")
    assert columns(metrics, "step", "tokens", "samples") == columns(whole, "step", "tokens", "samples")
    assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    attempts = json.loads((folder / "runs" / "one-rank" / "manifest.json").read_text())["attempts"]
    assert [(one["strategy"], one["size"]) for one in attempts] == [("ddp", 2), ("fsdp2", 3)]


def test_it_stops_before_its_time_is_over(folder: Path) -> None:
    done = dtrain(folder, "launch", "strategy=zero3", "run.name=limit", *LONG, "train.steps=100000",
                  "run.time_limit=0:45")  # fmt: skip
    assert done.returncode == 75, done.stderr
    told = {event["kind"]: event["monotonic"] for event in rows(folder / "runs" / "limit" / "events.jsonl")}
    assert told["ended"] - told["launched"] < 45  # what comes before the ranks start does not count
    assert "time limit" in outcome(folder, "limit")["message"]
    step = outcome(folder, "limit")["step"]
    assert (folder / "runs" / "limit" / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()


def test_a_run_that_is_done_goes_on_when_it_gets_more_steps(folder: Path) -> None:
    short = [*LONG, "train.steps=6", "schedule=constant", "schedule.warmup_steps=2", "strategy=ddp", "run.name=more"]
    assert dtrain(folder, "launch", *short).returncode == 0
    again = dtrain(folder, "launch", *short)
    assert again.returncode == 2
    assert "this run is done" in again.stderr
    # A constant rate is the same whatever the length: nothing has to be allowed.
    longer = dtrain(folder, "launch", *short, "train.steps=9")
    assert longer.returncode == 0, longer.stderr
    assert [row["step"] for row in rows(folder / "runs" / "more" / "metrics.jsonl")] == list(range(1, 10))
    changed = dtrain(folder, "launch", *short, "train.steps=12", "optim.lr=1e-4", "run.seed=1")
    assert changed.returncode == 2
    for line in ("optim.lr: was 0.005, is 0.0001", "run.seed: was 0, is 1", "resume.allow=["):
        assert line in changed.stderr
    assert (folder / "runs" / "more" / "manifest.json").read_text().count('"attempt":') == 2, "nothing was started"


def test_another_runs_checkpoint_is_a_start(folder: Path, whole: list[dict]) -> None:
    done = dtrain(folder, "launch", "strategy=zero1", "run.name=from-other", "resume=runs/whole", *LONG,
                  f"train.steps={STEPS + 2}", "resume.allow=[train.steps]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resume: allowed: train.steps: was 60, is 62" in done.stdout
    assert [row["step"] for row in rows(folder / "runs" / "from-other" / "metrics.jsonl")] == [61, 62]
    nowhere = dtrain(folder, "launch", "run.name=nowhere", "resume=runs/nothing", *LONG)
    assert nowhere.returncode == 2
    assert "runs/nothing: no checkpoint" in nowhere.stderr
    assert not (folder / "runs" / "nowhere" / "logs").exists()
