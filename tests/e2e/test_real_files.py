"""Files that people really bring, through the real command: prepared with no option but their path, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.cli import run

SMALL = ["dataset.max_length=128", "model.hidden=64", "model.layers=2", "model.intermediate=128",
         "launcher.procs=1", "strategy=ddp", "eval.max_rows=2", "train.steps=5"]  # fmt: skip
LINES = {
    "alpaca_en_demo.json": "alpaca rows (instruction, input, output) as conversations",
    "identity.json": "alpaca rows (instruction, input, output) as conversations",
    "dpo_en_demo.json": "preference rows (messages=conversations, chosen, rejected)",
    "kto_en_demo.json": "kto rows (messages, label) as replies with a verdict",
    "c4_demo.jsonl": "text rows (text) as texts",
    "wiki_demo.txt": "plain text, a document for each line",
    "glaive_toolcall_en_demo.json": "roles: human as user, gpt as assistant, observation as tool",
    "medical_dialogue_gb18030.csv": "csv in gb18030 with , between cells",
}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = request.config.rootpath.parent / "shared" / "data"
    if not found.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("name", [name for name in LINES if not name.startswith("medical")])
def test_prepared(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "build", f"dataset.path={folder / name}"]) == 0
    assert LINES[name] in capsys.readouterr().out


def test_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of the longest one, in another encoding and without a word of English but in its header."""
    name = "medical_dialogue_gb18030.csv"
    Path(name).write_bytes(b"".join((folder / name).read_bytes().splitlines(keepends=True)[:300]))
    assert run(["launch", f"dataset.path={name}", *SMALL]) == 0
    assert LINES[name] in capsys.readouterr().out
    steps = [json.loads(line) for line in Path("runs/demo/metrics.jsonl").read_text().splitlines()]
    assert [0 < step["loss"] < 20 for step in steps] == [True] * 5
