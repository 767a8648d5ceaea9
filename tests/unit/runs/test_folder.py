from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain.errors import DataError, NonFiniteError
from dtrain.runs import RunDir, first_failure, list_runs, record_failure, versions
from dtrain.runs.failures import kind_of


def fail(run: RunDir, rank: int, error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:
        record_failure(run, 0, rank, caught, phase="train", step=3)


def test_attempts_count_from_zero_and_never_share_a_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: run.new_attempt(), range(8))) == list(range(8))
    assert run.log(7, 2).relative_to(run.path).as_posix() == "logs/attempt-7/rank-2.log"


def test_the_manifest_keeps_its_attempts(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.write_manifest({"strategy": "ddp", "dir": tmp_path})
    run.add_attempt(0, size=2)
    run.add_attempt(0, outcome="failed")
    run.add_attempt(1, size=4)
    run.write_manifest({"strategy": "zero3"})
    run.update_manifest(steps=9)
    manifest = run.read_manifest()
    assert (manifest["strategy"], manifest["steps"]) == ("zero3", 9)
    assert [(entry["attempt"], entry["size"]) for entry in manifest["attempts"]] == [(0, 2), (1, 4)]
    assert manifest["attempts"][0]["outcome"] == "failed"
    assert [path.name for path in run.path.iterdir()] == ["manifest.json"]


def test_events_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: run.event("tick", number=number, pad="x" * 3000), range(64)))
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert sorted(event["number"] for event in events) == list(range(64))
    assert {"time", "monotonic", "kind"} <= events[0].keys()


def test_an_event_on_a_lost_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(tmp_path / "gone").event("save", step=4)
    assert "event lost: save" in capsys.readouterr().err


def test_the_cause_comes_before_its_echo(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    fail(run, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:42614"))
    fail(run, 2, RuntimeError("[3] is setting up NCCL communicator ... Connection reset by peer"))
    assert run.first_failure(0).rank == 0
    fail(run, 1, ValueError("row 7 is a banana"))
    first = run.first_failure(0)
    assert (first.rank, first.type, first.kind, first.step) == (1, "ValueError", "worker", 3)
    assert "banana" in first.traceback
    assert first.log == "logs/attempt-0/rank-1.log"
    assert first_failure([]) is None


def test_the_first_failure_of_a_rank_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    fail(run, 0, ValueError("first"))
    fail(run, 0, RuntimeError("while ending"))
    assert run.first_failure(0).message == "first"


@pytest.mark.parametrize(("error", "kind"), [
    (DataError("x"), "user"), (NonFiniteError("x"), "nonfinite"), (OSError(errno.ENOSPC, "full"), "storage"),
    (KeyError("x"), "worker")])  # fmt: skip
def test_kinds(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


@pytest.mark.parametrize(("kind", "state", "code"), [
    ("done", "done", 0), ("stopped", "stopped", 75), ("user", "failed", 2), ("worker", "failed", 3),
    ("hang", "failed", 3)])  # fmt: skip
def test_an_outcome_is_of_its_attempt(tmp_path: Path, kind: str, state: str, code: int) -> None:
    run = RunDir(tmp_path)
    assert run.read_outcome() is None
    fail(run, 1, ValueError("x"))
    written = run.write_outcome(kind, 0, step=7, failure=run.first_failure(0))
    assert (written.state, written.exit_code) == (state, code)
    assert run.read_outcome(0) == written
    assert run.read_outcome(1) is None


def test_list_runs(tmp_path: Path) -> None:
    for name, started in (("old", "2020"), ("new", "2021"), ("live", "2022")):
        run = RunDir(tmp_path / name)
        run.write_manifest({"started": started, "strategy": "ddp", "size": 2, "steps": 10})
        run.new_attempt()
        run.metrics.write_text('{"step": 4, "loss": 2.5}\n{"step": 5, "lo')  # torn by a kill
    RunDir(tmp_path / "old").write_outcome("done", 0, step=10)
    (tmp_path / "unrelated").mkdir()
    RunDir(tmp_path / ".cache").write_manifest({})
    with RunDir(tmp_path / "live").lock():
        runs = list_runs(tmp_path)
    assert [(run.name, run.state) for run in runs] == [("live", "running"), ("new", "died"), ("old", "done")]
    assert (runs[1].step, runs[1].steps, runs[1].loss, runs[1].size) == (4, 10, 2.5, 2)
    assert list_runs(tmp_path / "none") == []


def test_versions_without_importing(tmp_path: Path) -> None:
    code = (
        "import sys, json; from dtrain.runs import versions; said = versions();"
        "assert 'torch' not in sys.modules; print(json.dumps(said))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    said = json.loads(done.stdout)
    assert "torch" in said["packages"]
    assert said["git"] is None


def test_versions_name_the_commit(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True, env={**os.environ, "HOME": str(tmp_path)})
    assert versions(tmp_path)["git"]["dirty"] is False
    (tmp_path / "f").write_text("2")
    found = versions(tmp_path)["git"]
    assert (len(found["commit"]), found["dirty"]) == (40, True)
