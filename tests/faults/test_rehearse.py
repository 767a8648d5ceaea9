"""The rehearsal of a run: what it shows, what it leaves, and what it says where the run would fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain import cli
from dtrain.runs import RunDir
from dtrain.runs.process import REHEARSAL
from dtrain.verbs import rehearse
from tests.faults.harness import TYPED, Fault, launch, rows_of


def _as_rehearsed() -> None:
    os.environ[REHEARSAL] = str(rehearse.STEPS)


def rehearsed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: str,
              fail: str | None = None) -> tuple[int, str]:  # fmt: skip
    """With ranks that are forked instead of a command that is started."""
    fault = Fault(fail=fail, before=_as_rehearsed)

    def forked(words: list[str]) -> int:
        name = next(word for word in words if word.startswith("run.name=")).removeprefix("run.name=").strip("'")
        return launch(folder, name, *(word for word in words if not word.startswith("run.name=")), fault=fault).code

    monkeypatch.setattr(rehearse, "_launch", forked)
    monkeypatch.chdir(folder)
    code = cli.run(["rehearse", *TYPED, *typed])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_it_shows_each_part_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = rehearsed(folder, monkeypatch, capsys, "run.name=tried", "train.steps=3", "tracker.jsonl.plot=true")
    assert code == 0, said
    parts = [line.split()[0] for line in said.splitlines() if not line.startswith("---") and line]
    assert parts == ["start-up", "memory", "step", "save", "eval", "stop"]
    assert not (folder / "runs" / "tried.rehearsal").exists()
    assert not (folder / "runs" / "tried").exists()


def test_the_longest_rows_come_first_and_are_gone_on_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ("run.name=kept", "train.steps=1000", "dataset.packing=false", "--keep")
    code, said = rehearsed(folder, monkeypatch, capsys, *typed)
    assert code == 0, said
    assert "for 1,000 steps, if all were like these" in said
    run = RunDir(folder / "runs" / "kept.rehearsal")
    assert [one["ended"] for one in run.read_manifest()["attempts"]] == ["stopped", "stopped"]
    lengths = _lengths(run)
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for samples in (0, 4, 8, 12):
        ids = [i for rank in rows_of(run, int(samples >= 8)) for i in dict(rank)[samples]]
        assert sorted(ids) == sorted(longest[samples : samples + 4])


def _lengths(run: RunDir) -> list[int]:
    from dtrain.data.store import RowStore

    return RowStore(Path(run.read_manifest()["data"]["dir"]) / "train.arrow").lengths.tolist()


def test_what_would_end_the_run_ends_the_rehearsal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = rehearsed(folder, monkeypatch, capsys, "run.name=fails", fail="ckpt.tensors:full:rank=1:times=1")
    assert code == 3
    assert "failed     it ended with exit code 3: storage; its folder stays: " in said
    assert (folder / "runs" / "fails.rehearsal" / "outcome.json").is_file()
    code, said = rehearsed(folder, monkeypatch, capsys, "run.name=fails", fail="ckpt.tensors:full:attempt=1")
    assert code == 3
    assert "failed     going on ended with exit code 3: storage" in said


def test_it_is_not_for_several_machines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = rehearsed(folder, monkeypatch, capsys, "launcher=torchrun")
    assert code == 2
    assert "type launcher=local" in said
