"""The real command, killed: all of it at once, its first process alone, and one rank in the middle of a save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.checkpoint.verify import committed
from dtrain.runs import RunDir
from dtrain.runs.process import MARK
from tests import measured
from tests.e2e.command import ROOT, dtrain, kill_together, rows, workers_of, write_texts
from tests.faults.expect import EXACT, steps_of, unfinished
from tests.faults.harness import TYPED, launch
from tests.faults.test_damage import FILES, _flip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left processes in /proc"),
]

LONG = [*TYPED, "train.steps=80", "tracker=[console,jsonl]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command")
    write_texts(path / "texts.jsonl", 120)
    return path


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[list[object]]:
    """The metrics of a run to which nothing happened, by forked ranks: it makes no difference."""
    ended = launch(place, "undisturbed", *LONG, "checkpoint.every_steps=0", "tracker=jsonl")
    assert ended.code == 0, ended.said
    return figures(RunDir(place / "runs" / "undisturbed"))


def figures(run: RunDir) -> list[list[object]]:
    for event in rows(run.events):
        measured.lost(event.get("lost_steps", 0))
    return [[row[name] for name in EXACT] for row in rows(run.path / "metrics.jsonl")]


@pytest.fixture
def started(place: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A launch that trains and has saved; what is left of it is killed at the end."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for one in family(process):
            one.kill()


def start(place: Path, name: str, started: list[subprocess.Popen[str]]) -> tuple[RunDir, subprocess.Popen[str]]:
    slowly = "train.forward:sleep=0.1:attempt=0"  # it is not to be done before it is killed
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DTRAIN_FAIL": slowly}
    argv = [sys.executable, "-m", "dtrain", "launch", f"run.name={name}", *LONG]
    process = subprocess.Popen(argv, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    run, deadline = RunDir(place / "runs" / name), time.monotonic() + 120
    while len(committed(run.checkpoints)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return run, process


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all below it."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def of_run(run: RunDir) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get(MARK) == str(run.path) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found


def test_everything_killed_at_once_the_same_command_goes_on(
    place: Path, undisturbed: list[list[object]], started: list[subprocess.Popen[str]]
) -> None:
    run, process = start(place, "all", started)
    kill_together(one.pid for one in family(process))
    process.wait(60)
    psutil.wait_procs(of_run(run), timeout=60)
    newest = steps_of(run)[0]
    assert newest < 80, "it was too late for the test"
    left = unfinished(run)
    again = dtrain(place, "launch", "run.name=all", *LONG)
    assert again.returncode == 0, again.stderr
    assert ".lock was left by process " in again.stdout
    assert f"resume: going on from {run.checkpoints / f'step-{newest:08d}'}" in again.stdout
    assert again.stdout.count("which a killed save left") == len(left)
    assert unfinished(run) == []
    assert figures(run) == undisturbed
    assert workers_of(run.path) == []


def test_its_first_process_killed_alone_the_same_command_ends_the_others_first(
    place: Path, undisturbed: list[list[object]], started: list[subprocess.Popen[str]]
) -> None:
    """The ranks still save and stop when the second launch comes; no two of them write."""
    run, process = start(place, "launcher", started)
    process.kill()
    again = dtrain(place, "launch", "run.name=launcher", *LONG)
    assert again.returncode == 0, again.stderr
    assert figures(run) == undisturbed
    assert unfinished(run) == []
    assert of_run(run) == []
    attempts = run.read_manifest()["attempts"]
    begun = [event["step"] for event in rows(run.events) if event["kind"] == "training"]
    assert [one["first_step"] for one in attempts] == begun


def test_a_rank_killed_in_a_save_ends_the_run_and_a_damaged_checkpoint_is_passed_over(
    place: Path, undisturbed: list[list[object]]
) -> None:
    """The others wait for it in the middle of a save, where a wait may be long: they are ended in seconds."""
    run = RunDir(place / "runs" / "rank")
    done = dtrain(place, "launch", "run.name=rank", *LONG, env={"DTRAIN_FAIL": "ckpt.mid:kill:rank=1:after=21"})
    assert done.returncode == 3, done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rank 1 on ")
    assert "killed by SIGKILL" in last
    assert "next: less " in last
    assert of_run(run) == []
    ended = [event for event in rows(run.events) if event["kind"] in ("saved", "ended")]
    assert (ended[-2]["kind"], ended[-1]["kind"]) == ("saved", "ended")
    found_s = ended[-1]["monotonic"] - ended[-2]["monotonic"]
    assert found_s < 60
    measured.detected(found_s)
    assert json.loads(run.outcome.read_text())["failure"]["rank"] == 1
    newest, older = steps_of(run)
    _flip(committed(run.checkpoints)[0] / FILES[1])
    again = dtrain(place, "launch", "run.name=rank", *LONG)
    assert again.returncode == 0, again.stderr
    spoilt = run.checkpoints / f"step-{newest:08d}"
    assert (
        f"resume: passed over {spoilt}: {spoilt / FILES[1]}: its content differs from what was written" in again.stdout
    )
    assert f"resume: going on from step {older} instead" in again.stdout
    begun = [event["step"] for event in rows(run.events) if event["kind"] == "training"]
    assert begun == [0, older]
    assert [one["first_step"] for one in run.read_manifest()["attempts"]] == begun
    assert figures(run) == undisturbed
