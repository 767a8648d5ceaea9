"""What a sweep says at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain import cli
from dtrain.runs import RunDir
from dtrain.verbs import launch


def test_its_runs_stand_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter((1.5, 1.25))

    def one(overrides: list[str], args: Any) -> int:
        name = overrides[-1].removeprefix("run.name='").rstrip("'")
        run = RunDir(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config.write_text("run: {}\n")
        run.write_manifest({"steps": 3, "strategy": "ddp", "size": 1})
        loss = next(losses)
        run.metrics.write_text(json.dumps({"step": 3, "loss": loss}) + "\n")
        run.evals.write_text(json.dumps({"step": 3, "loss": loss + 1}) + "\n")
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", one)
    assert cli.run(["launch", "-m", "run.name=rates", "optim.lr=1e-3,1e-4", "device=cpu", "launcher.procs=1"]) == 0
    said = capsys.readouterr().out
    title, *rows = said[said.index("--- 2 of 2 runs done\n") :].splitlines()[1:]
    assert title.split() == ["name", "state", "step", "loss", "eval", "strategy", "ranks", "started"]
    assert [row.split()[0] for row in rows] == ["rates-optim.lr=0.001", "rates-optim.lr=0.0001"]
    assert [row.split()[3:5] for row in rows] == [["1.5000", "2.5000"], ["1.2500", "2.2500"]]


def test_what_is_only_shown_has_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["launch", "-m", "--dry-run", "optim.lr=1e-3,1e-4", "device=cpu", "launcher.procs=1"]) == 0
    assert capsys.readouterr().out.endswith("--- 2 of 2 runs shown\n")
