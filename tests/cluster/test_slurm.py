"""Jobs on a real Slurm of two nodes: they end, whatever becomes of them on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.runs import RunDir
from tests import measured
from tests.cluster.slurm import missing, output, slurm, until
from tests.e2e.command import ROOT, SMALL, dtrain, kill_together, write_texts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

TYPED = [*SMALL, "dataset.path=texts.jsonl", "launcher=slurm", "launcher.nodes=2", "strategy=ddp", "eval.every_steps=0",
         "schedule=constant", "launcher.join_timeout_s=120"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm") / "conf") as env:
        yield env


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / 'a b\'s "100%j" $(touch x);'
    made.mkdir()
    write_texts(made / "texts.jsonl")
    return made


def slowly(*attempts: int) -> dict[str, str]:
    """Environment of a job in which these are still on their way when something is done to them."""
    return {"DTRAIN_FAIL": ",".join(f"train.forward:sleep=0.2:attempt={one}" for one in attempts)}


def submit(cluster: dict[str, str], folder: Path, *typed: str, **env: str) -> tuple[str, RunDir]:
    """The job's number, and its run."""
    done = dtrain(folder, "launch", *TYPED, "run.name=a b", *typed, env={**cluster, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("submitted"))
    return line.split()[2].rstrip(";"), RunDir(folder / "runs" / "a b")


def state(cluster: dict[str, str], job: str) -> str:
    text = output(["scontrol", "show", "job", job, "--oneliner"], cluster)
    return next((word.removeprefix("JobState=") for word in text.split() if word.startswith("JobState=")), "not told")


def rows(run: RunDir) -> list[dict[str, Any]]:
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def log(run: RunDir, job: str) -> str:
    path = run.path / f"job-{job}.log"
    return path.read_text() if path.exists() else "no log"


def trains(cluster: dict[str, str], run: RunDir, job: str, attempt: int) -> None:
    """Until this attempt has trained a step."""

    def there() -> bool:
        over = state(cluster, job) in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")
        assert not over, log(run, job)
        events = [json.loads(line) for line in run.events.read_text().splitlines()] if run.events.exists() else []
        began = [event["step"] for event in events if event["kind"] == "training" and event["attempt"] == attempt]
        return bool(began) and any(row["step"] > began[0] for row in rows(run))

    until(there, 120, lambda: log(run, job))


def ends(cluster: dict[str, str], run: RunDir, job: str, within_s: float = 120) -> str:
    over = ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")
    until(lambda: state(cluster, job) in over, within_s, lambda: log(run, job))
    return state(cluster, job)


def test_the_time_limit_is_met_and_the_run_goes_on(cluster: dict[str, str], folder: Path) -> None:
    slow = ["model.hidden=256", "model.layers=4", "model.intermediate=512", "batch.global_batch=32",
            "dataset.on_long=split"]  # fmt: skip
    job, run = submit(cluster, folder, *slow, "train.steps=100000", "launcher.time=1", "launcher.signal_s=1")
    trains(cluster, run, job, 1)
    assert f"job {job} is queued again" in log(run, job)
    subprocess.run(["scancel", job], env={**os.environ, **cluster}, check=True)
    attempts = run.read_manifest()["attempts"]
    assert attempts[0]["ended"] == "stopped"
    assert _lost(run) == [0, 0]
    measured.lost(0)
    assert attempts[1]["first_step"] > 0
    assert ends(cluster, run, job) == "CANCELLED"
    until(lambda: run.read_outcome(1) is not None, 120, lambda: log(run, job))
    assert (run.read_outcome(1).kind, run.read_outcome(1).reason) == ("stopped", "SIGTERM")
    assert not run.requeue.exists()
    got = rows(run)
    assert [row["step"] for row in got] == list(range(1, len(got) + 1))
    plain = [word for word in TYPED if not word.startswith("launcher")]
    whole = dtrain(folder, "launch", *plain, *slow, f"train.steps={len(got)}", "launcher.procs=2", "run.name=whole",
                   timeout_s=240)  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    assert [row["loss"] for row in got] == [row["loss"] for row in rows(RunDir(folder / "runs" / "whole"))]


def test_whatever_becomes_of_it_on_the_way_it_ends_all_the_same(cluster: dict[str, str], folder: Path) -> None:
    """Told to stop by a signal to its ranks and to its script, waiting for a node that is drained, a rank killed, and all
    of one node killed.
    """
    job, run = submit(
        cluster, folder, "train.steps=120", "launcher.max_restarts=2", "checkpoint.every_steps=3", **slowly(0, 1, 2, 3)
    )
    script = run.path / "job.sh"
    if shutil.which("shellcheck"):
        assert output(["shellcheck", str(script)], {}) == ""

    def ask(*argv: str) -> None:
        subprocess.run(argv, env={**os.environ, **cluster}, check=True)

    trains(cluster, run, job, 0)
    ask("scontrol", "update", "nodename=n2", "state=drain", "reason=test")  # what runs there goes on
    ask("scancel", "--signal=USR1", job)
    until(lambda: state(cluster, job) == "PENDING", 120, lambda: log(run, job))
    assert run.read_manifest()["attempts"][-1]["ended"] == "stopped"
    ask("scontrol", "update", "nodename=n2", "state=resume")
    trains(cluster, run, job, 1)
    ask("scancel", "--signal=USR1", "--batch", job)
    trains(cluster, run, job, 2)
    until(lambda: _events(run, "saved")[-1]["attempt"] == 2, 120)  # else the next attempt would be said to get nowhere
    os.kill(_of(run, rank=1), signal.SIGKILL)
    trains(cluster, run, job, 3)
    kill_together(_all_of(_of(run, rank=1)))
    assert ends(cluster, run, job) == "COMPLETED", log(run, job)
    attempts = run.read_manifest()["attempts"]
    assert [one["ended"] for one in attempts] == ["stopped", "stopped", "worker", "lost", "done"], log(run, job)
    lost = _lost(run)
    assert lost[:3] == [0, 0, 0], "told to stop it saves"
    measured.lost(max(lost))
    assert "killed by SIGKILL" in log(run, job)
    assert log(run, job).count("is queued again") == 4
    steps = [row["step"] for row in rows(run)]
    assert sorted(set(steps)) == list(range(1, 121))
    assert not (folder / "x").exists()
    left = [one for one in run.nodes.iterdir() if one.is_dir()]
    assert len(left) <= 1  # of the one that was killed; a start that lasts longer removes it


def test_a_job_that_is_told_while_it_prepares_its_data_is_queued_again(cluster: dict[str, str], folder: Path) -> None:
    """By its script, as before the time limit, when no rank is there to look for the file; and by a signal to all."""
    large = folder / "large.jsonl"
    large.write_text((folder / "texts.jsonl").read_text() * 1000)
    typed = [f"dataset.path={large.name}", "launcher.prepare=job"]
    for name, how, why in (("one", ["--batch"], "the file STOP"), ("two", [], "SIGUSR1")):
        job, _ = submit(cluster, folder, *typed, f"run.name={name}")
        run = RunDir(folder / "runs" / name)
        until(lambda job=job, run=run: "data: preparing" in log(run, job), 120, lambda job=job, run=run: log(run, job))
        subprocess.run(["scancel", "--signal=USR1", *how, job], env={**os.environ, **cluster}, check=True)
        until(lambda job=job: state(cluster, job) == "PENDING", 150, lambda job=job, run=run: log(run, job))
        said = log(run, job)
        subprocess.run(["scancel", job], env={**os.environ, **cluster}, check=True)
        assert f"{why}: ended while no rank ran" in said
        assert f"job {job} is queued again" in said
        assert run.attempts() == []


def test_a_sweep_is_an_array_whose_tasks_are_queued_again_by_themselves(cluster: dict[str, str], folder: Path) -> None:
    done = dtrain(folder, "launch", "-m", *TYPED, "launcher.nodes=1", "train.steps=150", "run.seed=1,2", "run.name=a b",
                  env={**cluster, **slowly(0)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    number = next(line for line in done.stdout.splitlines() if line.startswith("submitted")).split()[2].rstrip(":")
    runs = [RunDir(folder / "runs" / f"a b-run.seed={seed}") for seed in (1, 2)]
    tasks = [f"{number}_{i}" for i in range(2)]
    for run, task in zip(runs, tasks, strict=True):
        trains(cluster, run, task, 0)
    for task in tasks[::-1]:  # one of them has the array's own number, and is not to take the other with it
        subprocess.run(["scancel", "--signal=USR1", "--batch", task], env={**os.environ, **cluster}, check=True)
    for run, task in zip(runs, tasks, strict=True):
        assert ends(cluster, run, task) == "COMPLETED"
        said = (folder / "runs" / f"job-{task}.log").read_text()
        assert said.count("is queued again") == 1
        assert f"job {task} is queued again" in said
        assert [one["ended"] for one in run.read_manifest()["attempts"]] == ["stopped", "done"]
        assert [row["step"] for row in rows(run)] == list(range(1, 151))
    assert not (folder / "x").exists()


def _events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [event for event in events if event["kind"] == kind]


def _lost(run: RunDir) -> list[int]:
    return [event["lost_steps"] for event in _events(run, "launched")]


def _all_of(rank: int) -> list[int]:
    """The processes of that rank's node: its launcher, which Slurm has started, first."""
    process = psutil.Process(rank)
    while (above := process.parent()) is not None and "slurmstepd" not in above.name():
        process = above
    return [process.pid, *(one.pid for one in process.children(recursive=True))]


def _of(run: RunDir, rank: int) -> int:
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except psutil.Error:
            continue
        if env.get("DTRAIN_RUN") == str(run.path) and env.get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"rank {rank} is not running")


def test_in_an_allocation_the_tasks_are_started_there(cluster: dict[str, str], folder: Path) -> None:
    argv = ["salloc", "--nodes=2", "--quiet", sys.executable, "-m", "dtrain", "launch", *TYPED, "train.steps=4",
            "run.name=now"]  # fmt: skip
    env = {**os.environ, **cluster, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240,
                         stdin=subprocess.DEVNULL)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "which is there already: bash" in ran.stdout
    assert len(rows(RunDir(folder / "runs" / "now"))) == 4


def test_the_doctor_on_every_node(cluster: dict[str, str], folder: Path) -> None:
    asked = ["doctor", "--launcher", "slurm", "--dir", "shared", "--only", "limits,ranks", "--procs", "1"]
    ran = dtrain(folder, *asked, "launcher.nodes=2", env=cluster)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [line.split()[1:3] for line in ran.stdout.splitlines()]
    assert [one[0] for one in found] == ["n1", "n2", "nodes", "clocks", "ranks"], (
        "a line of each, and what they found together"
    )
    assert "n1, n2 see one " in ran.stdout
    assert "2 processes sum up" in ran.stdout
    nowhere = dtrain(folder, *asked, "launcher.partition=none", env=cluster)
    assert nowhere.returncode == 2
    assert "invalid partition" in nowhere.stderr
    assert "srun: exit code 1, and no node answered" in nowhere.stderr
