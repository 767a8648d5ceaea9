"""Files that people really bring, with no option but their path."""

from __future__ import annotations

import pytest

from dtrain.datasets.base import Chat, Judged, Preference, Text
from dtrain.datasets.files import Files

EXPECTED = {
    "alpaca_en_demo.json": (Chat, 999, "alpaca rows (instruction, input, output) as conversations"),
    "identity.json": (Chat, 91, "alpaca rows (instruction, input, output) as conversations"),
    "glaive_toolcall_en_demo.json": (Chat, 300, "sharegpt rows (messages=conversations, tools) as conversations"),
    "dpo_en_demo.json": (Preference, 300, "preference rows (messages=conversations, chosen, rejected) as pairs of replies"),
    "kto_en_demo.json": (Judged, 300, "kto rows (messages, label) as replies with a verdict"),
    "c4_demo.jsonl": (Text, 300, "text rows (text) as texts"),
    "wiki_demo.txt": (Text, 30, "text rows (text) as texts"),
    "medical_dialogue_gb18030.csv": (
        Chat, 7644, "qa rows (question=ask, answer) as conversations; columns not used: department, title"),
}  # fmt: skip


@pytest.fixture
def folder(request):
    found = request.config.rootpath.parent / "shared" / "data"
    if not found.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_file(folder, name):
    files = Files(path=str(folder / name))
    assert files.problems() == []
    shape, num, said = EXPECTED[name]
    assert said in files.notes()
    examples = list(files.examples())
    assert len(examples) == num
    assert {type(example) for example in examples} == {shape}
    if name.startswith("medical"):
        assert files.notes()[0].endswith("csv in gb18030 with , between cells")
        assert examples[0].messages[0]["content"].startswith("我有高血压")
    if name.startswith("glaive"):
        assert all(example.tools for example in examples if any("tool_calls" in one for one in example.messages))
        assert sum("tool_calls" in one for example in examples for one in example.messages) > 100


def test_every_real_file_is_tried(folder):
    assert {path.name for path in folder.iterdir()} == {*EXPECTED, "README.md"}
