"""Runs as the command shows, compares and stops them; written down by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain import cli
from dtrain.runs import Holder, RunDir, record_failure
from dtrain.runs.listing import summary
from dtrain.verbs import _runs_tail


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, lr in (("a", 0.1), ("b", 0.2)):
        run = RunDir(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config.write_text(f"run:\n  name: {name}\noptim:\n  lr: {lr}\ntrain:\n  steps: 4\n")
        run.write_manifest({"name": name, "steps": 4, "size": 2, "result": {"last_loss": lr * 10, "steps": 4}})
        row = {"loss": 1.5, "grad_norm": 1.0, "lr": lr, "tokens_per_s": 1000.0, "mem_bytes": 2**20, "step_s": 1.0}
        run.metrics.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in range(1, 5)))
    return tmp_path / "runs"


def typed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.run(["runs", *argv])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_tail(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = typed(capsys, "tail", "a", "-n", "2")
    assert code == 0
    assert said.splitlines() == [
        f"step {step}/4  loss 1.5000  grad 1.00  lr 1.00e-01  1.00k tok/s  1 MiB" for step in (3, 4)
    ]
    assert typed(capsys, "tail", "a", "-n", "-1")[0] == 2
    (runs / "a" / "metrics.jsonl").unlink()
    assert "no steps in metrics.jsonl; it is new" in typed(capsys, "tail", "a")[1]


def test_diff(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = typed(capsys, "diff", "a", "b")
    assert code == 1
    assert [line.split() for line in said.splitlines()] == [
        ["a", "b"],
        ["optim.lr", "0.1", "0.2"],
        ["last", "loss", "1", "2"],
    ]
    assert typed(capsys, "diff", "a", "a") == (0, "no difference\n")


def test_show_names_who_failed_and_what_to_do(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(runs / "a")
    run.new_attempt()
    run.add_attempt(0, micro_batch=4, strategy="ddp", size=2)
    try:
        raise MemoryError("no more\nof it")
    except MemoryError as error:
        failure = record_failure(run, 0, 1, error, phase="train", step=3, rows=[4, 7])
    run.write_outcome("oom", 0, message=failure.message, failure=failure)
    said = {line.split()[0]: line for line in typed(capsys, "show", "a")[1].splitlines()}
    assert said["outcome"].endswith("oom: no more")
    assert said["failure"].endswith("in train at step 3")
    assert "batch.micro_batch=2 " in said["hint"]
    assert said["open"].endswith("rank-1.log")


def test_states(runs: Path) -> None:
    run = RunDir(runs / "a")
    assert summary(run).state == "new"
    run.event("submitted", job="7")
    assert summary(run).state == "queued"
    run.new_attempt()
    run.event("launched", attempt=0)
    assert summary(run).state == "died"
    run.write_outcome("stopped", 0, reason="the time limit is near")
    assert summary(run).state == "preempted"
    run.write_outcome("stopped", 0, reason="SIGTERM")
    assert summary(run).state == "stopped"
    with run.lock():
        assert summary(run).state == "running"
        run.new_attempt()
        assert summary(run).state == "resumed"


HOLDS = """
import signal, sys, time
from dtrain.runs import RunDir
run, told = RunDir(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
with run.lock():
    run.event("ready")
    while len(told) < int(sys.argv[2]):
        time.sleep(0.01)
    run.write_outcome("stopped", run.new_attempt(), message="SIGTERM: stopped after step 3")
"""


@contextlib.contextmanager
def held(run: RunDir, signals: int) -> Iterator[subprocess.Popen[bytes]]:
    """By a process that ends after so many signals."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(run.path), str(signals)])
    try:
        while not run.events.exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("signals", "more"), [(1, ()), (2, ("--now",))])
def test_stop(runs: Path, capsys: pytest.CaptureFixture[str], signals: int, more: tuple[str, ...]) -> None:
    with held(RunDir(runs / "a"), signals):
        assert typed(capsys, "stop", "a", *more) == (0, "stopped: SIGTERM: stopped after step 3\n")
    code, said = typed(capsys, "stop", "a")
    assert code == 2
    assert "it is stopped, so there is nothing to stop" in said


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_run_of_somebody_else_is_theirs_to_stop(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*what: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run = RunDir(runs / "a")
    holder = Holder.me() if where == "here" else dataclasses.replace(Holder.me(), host="elsewhere")
    monkeypatch.setattr(RunDir, "holder", lambda run: holder)
    monkeypatch.setattr(os, "kill", refuse)
    run.stop_trigger.symlink_to(runs / "nowhere" / "x")
    run.new_attempt()
    code, said = typed(capsys, "stop", "a")
    assert (code, "whoever started it can stop it" in said) == (2, True), said


def test_what_a_file_refuses_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(args: object) -> int:
        raise PermissionError(13, "Permission denied", "/theirs/file")

    monkeypatch.setattr("dtrain.verbs.runs.run", refuse)
    code, said = typed(capsys, "ls")
    assert (code, said.startswith("error: /theirs/file: Permission denied; ")) == (2, True)


def test_stop_does_not_wait_for_ever(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(RunDir(runs / "a"), 2) as process:
        code, said = typed(capsys, "stop", "a", "--wait", "0.3")
        assert (code, "has not ended within 0.3 s" in said) == (3, True)
        assert process.poll() is None


def test_follow_until_it_ends(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, looks = RunDir(runs / "a"), threading.Event()

    class Growing(_runs_tail._Growing):
        def more(self) -> list[dict[str, Any]]:
            looks.set()
            return super().more()

    monkeypatch.setattr(_runs_tail, "_Growing", Growing)
    with held(run, 1) as process:

        def goes_on() -> None:
            assert looks.wait(60)
            with run.metrics.open("a") as file:
                file.write(run.metrics.read_text().splitlines()[0].replace('"step": 1', '"step": 5') + "\n")
            os.kill(process.pid, signal.SIGTERM)

        threading.Thread(target=goes_on).start()
        code, said = typed(capsys, "tail", "a", "-n", "0", "-f")
    assert code == 75
    assert said.splitlines()[0].startswith("step 5/4  loss 1.5000")
    assert said.splitlines()[-1] == "stopped: SIGTERM: stopped after step 3"


def test_ls_has_the_last_eval(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "a" / "eval.jsonl").write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": 2.5}\n')
    code, said = typed(capsys, "ls")
    found = {row.split()[0]: row.split()[3:5] for row in said.splitlines()}
    assert (code, found) == (0, {"name": ["loss", "eval"], "a": ["1.5000", "2.5000"], "b": ["1.5000", "-"]})
