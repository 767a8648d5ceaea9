"""A run that runs is asked for a checkpoint, and keeps others from pruning under its hands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.checkpoint.verify import problems
from dtrain.cli import run
from tests.e2e.command import ROOT, SMALL, workers_of, write_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left processes in /proc"),
]


def test_saves_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl")
    argv = ["launch", *SMALL, "dataset.path=texts.jsonl", "launcher.procs=1", "strategy=ddp", "train.steps=100000",
            "eval.fraction=0", "schedule=constant", "checkpoint.every_minutes=null", "checkpoint.keep_last=9"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "dtrain", *argv], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    demo = tmp_path / "runs" / "demo"
    try:
        while not (demo / "metrics.jsonl").exists():  # the test's own time limit ends what hangs
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        saved = []
        for _ in range(2):
            assert run(["ckpt", "save", "demo", "--wait", "120"]) == 0, capsys.readouterr().err
            said = capsys.readouterr()
            assert f"asked process {process.pid}" in said.err
            saved.append(Path(said.out.strip()))
        assert not (demo / "SAVE").exists()
        assert run(["ckpt", "prune", "demo", "--keep-last", "1"]) == 2
        assert f"in use by process {process.pid}" in capsys.readouterr().err
    finally:
        os.kill(process.pid, signal.SIGTERM)
        told, _ = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert workers_of(demo) == []
    stopped_at = json.loads((demo / "outcome.json").read_text())["step"]
    there = sorted(demo.glob("checkpoints/step-*"))
    assert there == [*saved, demo / "checkpoints" / f"step-{stopped_at:08d}"]
    assert [problems(folder) for folder in there] == [[], [], []]
    assert run(["ckpt", "save", "demo"]) == 2
    capsys.readouterr()
    assert run(["ckpt", "prune", "demo", "--keep-last", "1"]) == 0
    assert "2 gone, " in capsys.readouterr().out.splitlines()[-1]
    assert sorted(demo.glob("checkpoints/step-*")) == there[2:]
