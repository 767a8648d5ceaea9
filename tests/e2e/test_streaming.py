"""Data that is read while training, through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.cli import run
from tests.e2e.command import SMALL, dtrain, rows, write_texts
from tests.e2e.test_real_files import LINES
from tests.e2e.test_real_files import SMALL as REAL

STREAM = [*SMALL, "dataset.path=texts.jsonl", "dataset.streaming=true", "dataset.stream_shards=4",
          "dataset.stream_buffer=16", "schedule=constant", "strategy=zero2"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts.jsonl")
    return tmp_path


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    """That the model is the same then, tests/contract shows."""
    first = dtrain(folder, "launch", *STREAM, "launcher.procs=2", "train.steps=3")
    assert first.returncode == 0, first.stderr
    assert "data: a stream in 4 shards; one that is through begins again, in another order" in first.stdout
    assert "data: streaming from the beginning; 4 shards, each read by one rank" in first.stdout
    then = dtrain(folder, "launch", *STREAM, "launcher.procs=1", "train.steps=6")
    assert then.returncode == 0, then.stderr
    assert "data: streaming going on after 24 samples; 4 shards, all read by the one rank" in then.stdout
    assert "data: reusing" in then.stdout
    metrics = rows(folder / "runs" / "demo" / "metrics.jsonl")
    assert [step["samples"] for step in metrics] == [8, 16, 24, 32, 40, 48]
    manifest = json.loads((folder / "runs" / "demo" / "manifest.json").read_text())
    tokens = sum(step["tokens"] for step in metrics)
    assert manifest["stream"]["consumed"] == {"all": {"samples": 48, "tokens": tokens}}
    assert manifest["stream"]["counts"]["read"] > 0


def test_a_real_file_is_streamed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    name = "medical_dialogue_gb18030.csv"
    shared = request.config.rootpath.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"".join((shared / name).read_bytes().splitlines(keepends=True)[:600]))
    assert run(["launch", f"dataset.path={name}", "dataset.streaming=true", *REAL]) == 0
    assert LINES[name] in capsys.readouterr().out
    steps = rows(tmp_path / "runs" / "demo" / "metrics.jsonl")
    assert [0 < step["loss"] < 20 for step in steps] == [True] * 5


def test_a_source_that_fails_on_the_way_ends_the_run_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef rows():\n    for i in range(500):\n        if i == 300 and 'RANK' in os.environ:\n"
        "            raise OSError('the database is gone')\n        yield {'text': f'number {i} ' + 'and more ' * (i % 9)}\n"
    )
    done = dtrain(tmp_path, "launch", *SMALL[1:], "dataset=python", "dataset.function=mine:rows", "plugins=[mine]",
                  "dataset.streaming=true", "launcher.procs=1", "strategy=ddp",
                  env={"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: dataset.function=mine:rows: OSError after 300 rows: the database "
                                            f"is gone ({tmp_path / 'mine.py'}:6)")  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), [
    (["train.steps=null", "train.epochs=1"], "train.epochs=1: of a stream nobody has counted the rows; set train.steps=N"),
    (["batch.global_batch=5000"], "batch.global_batch=5000: the dataset has only"),
    (["dataset.stream_shards=0"], "dataset.stream_shards"),
])  # fmt: skip
def test_refused_before_anything_is_started(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str], typed: list[str], said: str) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert run(["launch", *STREAM, *typed]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "runs" / "demo").exists()


def test_previewed_and_not_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    data = [one for one in STREAM if one.startswith(("dataset", "model"))]
    assert run(["data", "preview", *data, "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "sample 1 of the stream to train on: " in shown
    assert run(["data", "preview", *data, "--row", "1"]) == 0
    assert shown.partition("sample 1 of")[2] == capsys.readouterr().out.partition("sample 1 of")[2]
    assert run(["data", "preview", *data, "--eval"]) == 0
    assert run(["data", "build", *data]) == 0
    for verb in ("stats", "check"):
        assert run(["data", verb, *data]) == 2
        assert "look at it by `dtrain data preview`" in capsys.readouterr().err
