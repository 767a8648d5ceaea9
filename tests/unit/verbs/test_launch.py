"""What `dtrain launch` does before the ranks start."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain import cli
from dtrain.errors import RunError
from dtrain.runs import RunDir, lock
from dtrain.verbs import launch
from tests.e2e.command import SMALL, write_texts

TYPED = ["launch", *SMALL, "dataset.path=texts.jsonl", "strategy=ddp", "launcher.procs=1", "run.name=first"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl")
    return RunDir(tmp_path / "runs" / "first")


def test_other_machines_see_that_it_lives_while_it_reads_weights(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take longer than the silence after which another one takes the folder over."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    beats = 0

    def read(*what: Any) -> str:
        nonlocal beats
        held, deadline = run.path / lock.NAME, time.monotonic() + 5
        os.utime(held, (1, 1))
        while time.monotonic() < deadline and held.stat().st_mtime == 1:
            time.sleep(0.01)
        beats += held.stat().st_mtime != 1
        raise RunError("far enough")

    monkeypatch.setattr(launch, "_base", read)
    assert cli.run(TYPED) == 2
    assert beats == 1


def test_sigterm_ends_it_in_order(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(*what: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(launch, "_base", read)
    with pytest.raises(SystemExit) as ended:
        cli.run(TYPED)
    assert ended.value.code == 75
    assert "SIGTERM: ended while no rank ran" in capfd.readouterr().err
    assert run.holder() is None
    assert signal.getsignal(signal.SIGTERM) == before
