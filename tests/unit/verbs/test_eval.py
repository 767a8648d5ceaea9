"""What `dtrain eval` finds, beside whole logits and `cross_entropy` of transformers and torch on each row alone."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cli import run as dtrain
from dtrain.data.tokenizer import TextTokenizer
from dtrain.models.assets import weights_digest
from tests.unit.verbs.say import write_adapter, write_model

WORDS = ["the cat sat", "on the mat", "and the dog", "ran to the house", "hello there", "user system"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _ok(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    assert dtrain(["eval", *(str(one) for one in argv)]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    return said.out, said.err


def _refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert dtrain(["eval", *(str(one) for one in argv)]) == 2
    return capsys.readouterr().err


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.pop("kind") == kind]


def _nll(
    folder: Path, text: str, learned_from: int = 0, adapter: Path | None = None, label: str = ""
) -> tuple[float, int]:
    """Sum of the cross-entropy over the tokens that begin at that character or later, and the end of the text; of the
    text by itself. How many there are. `label`: after the text, by its own tokens, of which alone the loss is.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    tokenizer = TextTokenizer.load(folder)
    first = len(tokenizer.encode(text[:learned_from])) or 1
    if label:
        first = len(tokenizer.encode(text))
    ids = torch.tensor([[*tokenizer.encode(text), *(tokenizer.encode(label) if label else ()), tokenizer.eos_id]])
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits[0, -len(ids[0]) :][first - 1 : -1]  # prompts have more before these
    return float(torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")), len(ids[0]) - first


def _row(out: str, name: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_the_loss_of_each_source_and_of_all(model: Path, here: Path, capsys) -> None:
    for packing in ("true", "false"):
        files = {"one.jsonl": WORDS[:4], "two.jsonl": WORDS[4:]}
        for name, texts in files.items():
            _write(here / name, [{"text": text} for text in texts])
        out, _ = _ok(capsys, model, "--data", "one.jsonl", "--data", "two.jsonl", "dataset.max_length=32",
                     f"dataset.packing={packing}", "--out", here / f"out-{packing}")  # fmt: skip
        found = {name: [_nll(model, text) for text in texts] for name, texts in files.items()}
        found["all"] = [one for each in found.values() for one in each]
        for name, each in found.items():
            total, num = sum(one for one, _ in each), sum(num for _, num in each)
            _, targets, loss, perplexity = _row(out, name)
            assert int(targets) == num
            assert float(loss) == pytest.approx(total / num, abs=2e-6)
            assert float(perplexity.replace(",", "")) == pytest.approx(torch.tensor(total / num).exp().item(), rel=1e-4)
        rows = _read(here / f"out-{packing}", "loss")
        assert [row["source"] for row in rows] == ["one.jsonl"] * 4 + ["two.jsonl"] * 2
        assert len({(row["source"], row["row"], row["document"]) for row in rows}) == 6
        assert sorted(row["loss"] for row in rows) == pytest.approx(sorted(a / n for a, n in found["all"]), rel=1e-5)
    assert len({row["row"] for row in _read(here / "out-true", "loss")}) < 6


@pytest.mark.parametrize("kind", ["lora", "prompt", "ptuning", "prefix"])
def test_an_adapter_is_measured_with_its_model(model: Path, here: Path, capsys, kind: str) -> None:
    digest = weights_digest(model, here, lambda line: None)
    adapter = write_adapter(here / "adapter", model, path=str(model), digest=digest, kind=kind)
    _write(here / "a.jsonl", [{"text": text} for text in WORDS])
    found = [_nll(model, text, adapter=adapter) for text in WORDS]
    expected = sum(one for one, _ in found) / sum(num for _, num in found)
    for packing in ("true", "false"):
        out, _ = _ok(capsys, adapter, "dataset.path=a.jsonl", "dataset.max_length=32", f"dataset.packing={packing}")
        assert float(_row(out, "a.jsonl")[2]) == pytest.approx(expected, abs=2e-5)
    assert abs(expected - sum(_nll(model, text)[0] for text in WORDS) / sum(num for _, num in found)) > 1e-3


@pytest.mark.parametrize("kind", ["", "prompt", "prefix"])
def test_labels_by_how_likely_they_are(model: Path, here: Path, capsys, kind: str) -> None:
    adapter = None
    if kind:
        digest = weights_digest(model, here, lambda line: None)
        adapter = write_adapter(here / "adapter", model, path=str(model), digest=digest, kind=kind)
    labels = ["mat", "the dog", "house"]
    rows = [{"text": text, "label": labels[i % 3]} for i, text in enumerate(WORDS)]
    _write(here / "labels.jsonl", rows)
    out, _ = _ok(capsys, adapter or model, "--data", "labels.jsonl", "dataset.max_length=48", "objective=sft",
                 "--out", "out")  # fmt: skip
    lines = _read(here / "out", "label")
    hits = 0
    for line, row in zip(lines, rows, strict=True):
        scores = {label: -_nll(model, f"{row['text']}\n{label}", len(row["text"]) + 1, adapter)[0] for label in labels}
        assert line["scores"] == pytest.approx(scores, rel=1e-5)
        assert (line["label"], line["predicted"]) == (row["label"], max(scores, key=scores.__getitem__))
        hits += line["label"] == line["predicted"]
    assert f"labels.jsonl: 6 labelled rows, accuracy {hits / 6:.4f}, macro_f1 " in out
    table = out[out.index("is \\ said") :].splitlines()
    for line in table[1:4]:
        label, *counts = re.split(r" {2,}", line.strip())
        assert sum(map(int, counts)) == 2
        for other, count in zip(sorted(labels), counts, strict=True):
            assert int(count) == sum((one["label"], one["predicted"]) == (label, other) for one in lines)


def test_an_objective_of_labels_tells_of_each_text(model: Path, here: Path, capsys) -> None:
    labels = ["house", "mat", "the dog"]
    rows = [{"text": text, "label": labels[i % 3]} for i, text in enumerate(WORDS)]
    _write(here / "labels.jsonl", rows)
    out, _ = _ok(capsys, model, "--data", "labels.jsonl", "dataset.max_length=48", "objective=classify", "--out", "out")
    lines, losses = _read(here / "out", "loss"), []
    for line, row in zip(lines, rows, strict=True):
        scores = {label: _nll(model, f"{row['text']}\n", label=label)[0] for label in labels}
        losses.append(scores[row["label"]])
        assert line["loss"] == pytest.approx(losses[-1], rel=1e-5)
        assert (line["label"], line["predicted"]) == (row["label"], min(scores, key=scores.__getitem__))
    assert float(_row(out, "labels.jsonl")[2]) == pytest.approx(sum(losses) / 6, abs=1e-5)
    hits = sum(line["label"] == line["predicted"] for line in lines)
    assert f"accuracy {hits / 6:.4f}" in out


def _rows(here: Path) -> list[Any]:
    """As they were prepared."""
    from dtrain.data.store import RowStore

    (path,) = (here / "runs" / ".cache").glob("data-*/train.arrow")
    store = RowStore(path)
    return [store.row(i) for i in range(len(store))]


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "kto"])
def test_a_loss_that_compares_with_another_model(model: Path, here: Path, capsys, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.contract.preferences import OPTIONS, formula

    ask = {"role": "user", "content": "hello"}
    replies = [[ask, {"role": "assistant", "content": text}] for text in [*WORDS, "the dog", "mat", "house"] * 2]
    judged = [{"messages": one, "label": i % 3 > 0} for i, one in enumerate(replies)]
    pairs = [{"chosen": a, "rejected": b} for a, b in itertools.pairwise(replies)]
    _write(here / "a.jsonl", judged if name == "kto" else pairs)
    other = write_model(here / "other", seed=5)
    typed = ("--data", "a.jsonl", "dataset.max_length=64", "dataset.packing=false", *OPTIONS[name])
    out, err = _ok(capsys, model, *typed, "--reference", other, "--out", "out")
    assert f"reference: {other}" in err
    rows = _rows(here)
    assert len(rows) == len(judged if name == "kto" else pairs)
    plain, started = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (model, other))

    def expected(now: Any, started: Any) -> float:
        # 18 or 17 rows: 16 are looked at together, then the others.
        mean = formula(name, started)
        with torch.no_grad():
            return sum(len(part) * float(mean(now, part)) for part in (rows[:16], rows[16:])) / len(rows)

    loss = expected(plain, started)
    assert float(_row(out, "a.jsonl")[2]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert f"rewards/{'good' if name == 'kto' else 'margin'}" in out
    assert sum(row["loss"] for row in _read(here / "out", "loss")) / len(rows) == pytest.approx(loss, rel=1e-5)
    digest = weights_digest(model, here, lambda line: None)
    adapter = write_adapter(here / "adapter", model, path=str(model), digest=digest)
    out, err = _ok(capsys, adapter, *typed)
    assert f"reference: {model}" in err
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    assert float(_row(out, "a.jsonl")[2]) == pytest.approx(expected(tuned, plain), rel=1e-4, abs=1e-6)
    then = write_adapter(here / "then", model, path=str(model), digest=digest, seed=2, start=adapter)
    out, err = _ok(capsys, then, *typed)
    assert f"reference: {model} with the adapter {adapter}, which training started from" in err
    first, base = tuned, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, then)
    assert float(_row(out, "a.jsonl")[2]) == pytest.approx(expected(tuned, first), rel=1e-4, abs=1e-6)
    write_adapter(adapter, model, path=str(model), digest=digest, seed=3)
    assert f"{adapter} holds other weights now; bring it back, or make one " in _refused(capsys, then, *typed)
    shutil.rmtree(adapter)
    assert f"{adapter} is not there any more; bring it back, or make one " in _refused(capsys, then, *typed)
    out, _ = _ok(capsys, then, *typed, "--reference", model)
    assert float(_row(out, "a.jsonl")[2]) == pytest.approx(expected(tuned, plain), rel=1e-4, abs=1e-6)


def test_what_it_writes_beside_what_is_expected(model: Path, here: Path, capsys, monkeypatch) -> None:
    _write(here / "in.jsonl", [{"prompt": text} for text in WORDS[:3]])
    assert dtrain(["generate", str(model), "--in", "in.jsonl", "--out", "said", "--max-new-tokens", "9"]) == 0
    said = [json.loads(line)["generated"] for line in (here / "said").read_text(encoding="utf-8").splitlines()]
    # The first is what it says, the others are not.
    pairs = [{"prompt": text, "completion": say if i == 0 else "zzz"}
             for i, (text, say) in enumerate(zip(WORDS, said, strict=False))]  # fmt: skip
    _write(here / "pairs.jsonl", pairs)
    (here / "mine_of_eval.py").write_text("def length(written, expected): return len(expected)\n")
    monkeypatch.syspath_prepend(str(here))
    capsys.readouterr()
    out, err = _ok(capsys, model, "--data", "pairs.jsonl", "dataset.max_length=64", "dataset.columns.prompt=prompt",
                   "--generate", "--score", "mine_of_eval:length", "--max-new-tokens", 9, "--out", "out")  # fmt: skip
    lines = _read(here / "out", "generation")
    assert [line["generated"] for line in lines] == said
    assert [line["exact"] for line in lines] == [1.0, 0.0, 0.0]
    assert [line["length"] for line in lines] == [len(pairs[0]["completion"]), 3, 3]
    titles, values = (re.split(r" {2,}", line.strip()) for line in out.splitlines()[-3:-1])
    means = dict(zip(titles[2:], map(float, values[2:]), strict=True))
    assert means["exact"] == pytest.approx(1 / 3, abs=1e-4)
    assert ("bleu" in means) != ("BLEU is not told: it needs sacrebleu" in err)


def test_what_is_refused(model: Path, here: Path, capsys) -> None:
    assert "type --data FILE, or dataset.path=FILE" in _refused(capsys, model)
    text = _refused(capsys, model, "--data", "gone.jsonl", "--rows", 0, "--score", "a:b", "--out", "no/x")
    assert text.startswith("4 problems:\n"), text
    assert "--data gone.jsonl: no such file or folder" in text
    _write(here / "a.jsonl", [{"text": "the cat"}])
    text = _refused(capsys, model, "--data", "a.jsonl", "optim.lr=1", "nope")
    assert "optim.lr=1: not for `dtrain eval`, which takes keys of dataset, objective, template" in text
    text = _refused(capsys, model, "dataset=python", "dataset.function=not_allowed.rows:all")
    assert (
        "not_allowed is imported only where it is allowed; if it is a package of your own, type --plugin not_" in text
    )
    assert "dataset.max_lenth" in _refused(capsys, model, "--data", "a.jsonl", "dataset.max_lenth=32")
    assert "in which no reply is expected" in _refused(
        capsys, model, "--data", "a.jsonl", "--generate", "dataset.max_length=32"
    )
    pair = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}]}
    pair["rejected"] = [pair["chosen"][0], {"role": "assistant", "content": "cat"}]
    _write(here / "pairs.jsonl", [pair])
    text = _refused(capsys, model, "--data", "pairs.jsonl", "dataset.max_length=64")
    assert "the loss compares with the model that training started from, which it does not name" in text
    other = _refused(capsys, model, "--data", "pairs.jsonl", "dataset.max_length=64", "--reference", here / "no")
    assert "neither a run nor a folder" in other
    out, err = _ok(
        capsys, model, "--data", "pairs.jsonl", "dataset.max_length=64", "objective=orpo", "--reference", model
    )
    assert "not looked at, as the loss compares with no other model" in err
    assert _row(out, "pairs.jsonl")[1] == "1"
    assert _row(out, "pairs.jsonl")[3] == "-"
    (here / "nowhere.txt").mkdir()
    assert "neither a run nor a folder" in _refused(capsys, here / "nowhere.txt", "--data", "a.jsonl")


def test_rows_are_read_as_the_run_reads_its_own(model: Path, here: Path, capsys) -> None:
    """Whatever has become of the files that it was trained on: its row length and template, and what is typed."""
    from dtrain.config import frozen
    from dtrain.config.compose import compose
    from dtrain.config.validate import validate

    _write(here / "gone.jsonl", [{"text": text} for text in WORDS])
    config = validate(compose(["dataset.path=gone.jsonl", "dataset.max_length=3", "dataset.packing=false"]).values)
    folder = here / "runs" / "mine"
    folder.mkdir(parents=True)
    frozen.write(folder / "config.yaml", config)
    (folder / "export").symlink_to(model)
    (here / "gone.jsonl").rename(here / "there.jsonl")
    out, told = _ok(capsys, "mine", "--data", "there.jsonl")
    assert "rows of up to 3 tokens" in told
    assert int(_row(out, "there.jsonl")[0]) > len(WORDS)  # the longer ones are split
    out, _ = _ok(capsys, "mine", "--data", "there.jsonl", "dataset.max_length=64")
    assert _row(out, "there.jsonl")[0] == str(len(WORDS))
    assert "does not say where its rows are; type --data FILE" in _refused(capsys, "mine")
    assert "objective.train_on: without data" in _refused(capsys, "mine", "objective.train_on=all")
    assert "dataset.path=gone.jsonl: no such file" in _refused(capsys, "mine", "dataset.max_length=64")
