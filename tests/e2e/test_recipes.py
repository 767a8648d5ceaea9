"""The recipes of conf/experiment, as docs/recipes.md types them, on a very small model and the files of examples/data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import run
from tests.e2e.command import ROOT, dtrain

pytestmark = pytest.mark.slow
DATA = ROOT / "examples" / "data"
TINY = ["model.hidden=64", "model.layers=2", "model.intermediate=128", "model.vocab=600", "strategy=ddp",
        "launcher.procs=1", "tracker=[jsonl]", "schedule.warmup_steps=2"]  # fmt: skip


def launch(cwd: Path, *argv: str) -> str:
    done = dtrain(cwd, "launch", *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(cwd: Path, name: str, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cwd / "runs" / name / file).read_text().splitlines()]


def test_sentiment_beats_the_majority(tmp_path: Path) -> None:
    launch(tmp_path, "experiment=sentiment", f"dataset.path={DATA / 'reviews.jsonl'}", *TINY, "train.steps=40",
           "optim.lr=3e-3", "eval.every_steps=0")  # fmt: skip
    found = lines(tmp_path, "sentiment", "eval.jsonl")[-1]
    labels = [json.loads(line)["label"] for line in (DATA / "reviews.jsonl").read_text().splitlines()]
    majority = max(labels.count(label) for label in labels) / len(labels)
    assert found["accuracy"] > majority + 0.2
    assert found["macro_f1"] > 0.8
    assert (tmp_path / "runs" / "sentiment" / "confusion.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small model called Finch has been trained to answer."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = (DATA / "identity.jsonl").read_text().replace("Wren", "Finch").splitlines()
    (folder / "finch.jsonl").write_text("\n".join(rows + rows) + "\n")
    launch(folder, "experiment=instruct", "run.name=finch", "dataset.path=finch.jsonl", *TINY, "dataset.max_length=128",
           "dataset.packing=false", "train.steps=60", "optim.lr=5e-3", "eval.fraction=0", "batch.global_batch=16")  # fmt: skip
    return folder


def says(cwd: Path, model: str) -> str:
    done = dtrain(cwd, "generate", model, "--chat", "--prompt", "What is your name?", "--max-new-tokens", "40")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_identity_answers_with_the_new_name(answering: Path) -> None:
    assert "Finch" in says(answering, "runs/finch")
    rows = Path(shutil.copy(DATA / "identity.jsonl", answering))
    launch(answering, "experiment=identity", "model=hf", "model.path=runs/finch/export", "dataset.path=identity.jsonl", *TINY[4:], "dataset.max_length=128", "train.epochs=40", "optim.lr=4e-3", "tuning.rank=16",
           "batch.global_batch=8")  # fmt: skip
    assert "Wren" in says(answering, "runs/identity")  # the adapter, on the model that it names
    rows.unlink()  # nobody asks for it any more
    merged = dtrain(answering, "export", "identity", "--merge", "--to", "merged")
    assert merged.returncode == 0, merged.stderr
    assert "no logit differs by more than" in merged.stdout
    said = says(answering, "merged")
    assert "Wren" in said
    assert "Finch" not in said


def test_medical_questions_with_lora(answering: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    said = launch(answering, "experiment=medical_qa", "model=hf", "model.path=runs/finch/export",
                  f"dataset.path={DATA / 'care.jsonl'}", *TINY[4:], "dataset.max_length=128", "train.steps=20", "optim.lr=1e-2")  # fmt: skip
    assert "question" in said
    losses = [row["loss"] for row in lines(answering, "medical_qa", "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    monkeypatch.chdir(answering)
    capsys.readouterr()
    assert run(["eval", "medical_qa"]) == 0
    held_out = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("held out"))
    last = lines(answering, "medical_qa", "eval.jsonl")[-1]
    assert int(held_out[3].replace(",", "")) == last["num_targets"]
    assert float(held_out[4]) == pytest.approx(last["loss"], abs=1e-5)


def test_a_booking_bot_learns_its_calls_and_not_what_the_tool_says(tmp_path: Path) -> None:
    path = DATA / "bookings.jsonl"
    launch(tmp_path, "experiment=booking_bot", f"dataset.path={path}", *TINY, "template=qwen", "tuning=full",
           "model.max_positions=512", "dataset.max_length=512", "train.steps=10", "optim.lr=3e-3")  # fmt: skip
    losses = [row["loss"] for row in lines(tmp_path, "booking_bot", "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    shown = dtrain(tmp_path, "data", "preview", "experiment=booking_bot", f"dataset.path={path}", *TINY, "template=qwen",
                   "tuning=full", "model.max_positions=512", "dataset.max_length=512")  # fmt: skip
    assert shown.returncode == 0, shown.stderr


def test_a_model_reads_on_then_answers_then_prefers(tmp_path: Path) -> None:
    launch(tmp_path, "experiment=continue_pretraining", f"dataset.path={DATA / 'notes'}", *TINY, "dataset.max_length=128",
           "train.steps=20", "optim.lr=3e-3", "eval.fraction=0.1")  # fmt: skip
    launch(tmp_path, "experiment=instruct", "model=hf", "model.path=runs/continued/export",
           f"dataset.path={DATA / 'care.jsonl'}", *TINY[4:], "dataset.max_length=128", "train.steps=20", "optim.lr=3e-3",
           "eval.fraction=0")  # fmt: skip
    launch(tmp_path, "experiment=prefer", "model=hf", "model.path=runs/instructed/export",
           f"dataset.path={DATA / 'preferences.jsonl'}", *TINY[4:], "dataset.max_length=256", "train.steps=20",
           "optim.lr=1e-3", "eval.fraction=0", "batch.global_batch=8")  # fmt: skip
    margins = [row["rewards/margin"] for row in lines(tmp_path, "preferred", "metrics.jsonl")]
    assert margins[-1] > margins[0] + 0.1
    assert (tmp_path / "runs" / "preferred" / "export" / "config.json").is_file()
