"""Objectives through the real command: what is found in the data, what is told, what is exported, what is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from dtrain.cli import run
from tests.e2e.command import SMALL, dtrain, rows


def write_films(path: Path, num: int = 240) -> None:
    draw = random.Random(0)
    good, bad = ["wonderful", "moving", "funny"], ["dull", "awful", "tedious"]
    lines = ["text,label"]
    for i in range(num):
        is_good = draw.random() < 0.6
        words = draw.choices(good if is_good else bad, k=2)
        lines.append(f"Film {i} was {words[0]} and {words[1]},{'good' if is_good else 'bad'}")
    path.write_text("\n".join(lines) + "\n")


def write_pairs(path: Path, num: int = 120) -> None:
    lines = [{"prompt": f"Is {i} a number?", "chosen": f"Yes, {i} is.", "rejected": "No idea."} for i in range(num)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_classifier_beats_the_majority_and_loads_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    write_films(tmp_path / "films.csv")
    done = dtrain(tmp_path, "launch", *SMALL, "dataset.path=films.csv", "objective=classifier", "run.name=films",
                  "launcher.procs=2", "strategy=zero3", "train.steps=16", "eval.every_steps=16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "objective: classifier: 2 labels: bad, good" in done.stdout
    assert "dtrain generate" not in done.stdout
    folder = tmp_path / "runs" / "films"
    last = rows(folder / "eval.jsonl")[-1]
    assert last["accuracy"] > 0.9, "of 0.6 for the more frequent label"
    assert last["macro_f1"] > 0.9
    said = json.loads((folder / "confusion.json").read_text())
    assert said["labels"] == ["bad", "good"]
    assert sum(map(sum, said["counts"])) == last["num_targets"]
    assert (folder / "confusion.png").stat().st_size > 1000
    model = AutoModelForSequenceClassification.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    texts = tokenizer(["Film 3 was dull and tedious", "Film 5 was wonderful"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in found] == ["bad", "good"]
    assert run(["generate", str(folder), "--prompt", "a"]) == 2
    assert "has outputs of its own in place of a vocabulary" in capsys.readouterr().err
    assert run(["eval", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"accuracy {last['accuracy']:.4f}, macro_f1 {last['macro_f1']:.4f}" in said
    held_out = next(line.split() for line in said.splitlines() if line.startswith("held out "))
    assert float(held_out[4]) == pytest.approx(last["loss"], abs=1e-5)


def test_the_margin_of_pairs_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    done = dtrain(tmp_path, "launch", *SMALL, "dataset.path=pairs.jsonl", "template=chatml", "run.name=pairs",
                  "launcher.procs=2", "strategy=fsdp2", "train.steps=12", "eval.every_steps=6")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "objective: dpo" in done.stdout
    assert "objective.reference=cached" in done.stdout
    folder = tmp_path / "runs" / "pairs"
    first, *_, last = rows(folder / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5), "nothing is gained yet"
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margin"] > 0.3
    assert [one["rewards/accuracy"] for one in rows(folder / "eval.jsonl")][-1] == 1.0
    assert len(list((tmp_path / "runs" / ".cache").glob("reference-*"))) == 1
    assert run(["eval", str(folder)]) == 0
    said, own = capsys.readouterr(), rows(folder / "eval.jsonl")[-1]
    assert "reference: the weights that the run started from, from run.seed=0, " in said.err
    held_out = next(line.split() for line in said.out.splitlines() if line.startswith("held out "))
    assert float(held_out[4]) == pytest.approx(own["loss"], abs=1e-5)
    margin = float(said.out.partition("rewards/margin ")[2].partition(",")[0])
    assert margin == pytest.approx(own["rewards/margin"], abs=1e-4)


@pytest.mark.parametrize(("content", "typed", "words"), [
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n', ["objective=dpo"],
     r"1 bad row[^\n]*\n  data\.jsonl:2: .*rejected"),
    ('{"question": "a", "answer": "b"}\n', ["objective=dpo"],
     r"data\.jsonl:1: a chat row, and objective=dpo learns pairs of replies, which need columns `chosen` and `rejected`"),
    ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', ["objective=classify", "objective.labels=[x,z]"],
     r"data\.jsonl:2: a label that is not one of objective\.labels: 'y'; there are: x, z"),
    ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', ["objective=classifier"],
     "all rows have one label, 'x'"),
    ("", ["objective=dpo", "objective.loss=ipo", "objective.label_smoothing=0.1"],
     r"objective\.label_smoothing=0\.1: goes with objective\.loss=sigmoid"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, typed: list[str],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(content)
    assert run(["launch", *SMALL, "dataset.path=data.jsonl", "template=chatml", *typed]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert "Traceback" not in said
