"""Prompts of evals: typed, and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.schema import Eval
from dtrain.errors import DataError

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_a_file_is_read_in(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "b", "id": 1}\n\n{"messages": [{"role": "user", "content": "c"}]}\n', encoding="utf-8"
    )
    settled = Eval(prompts=("a",), prompts_file=str(tmp_path / "a.jsonl")).settled()
    assert settled.prompts_file is None
    assert [one.prompt for one in settled.asked()] == ["a", "b", [{"role": "user", "content": "c"}]]
    assert [one.place for one in settled.asked()] == ["eval.prompts[0]", "eval.prompts[1]", "eval.prompts[2]"]
    assert settled.problems() == []


def test_a_line_ends_at_a_new_line_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}', encoding="utf-8", newline="")
    assert [one.prompt for one in Eval(prompts_file=str(tmp_path / "a.jsonl")).settled().asked()] == ["a\u2028b", "c"]


def test_what_a_user_says() -> None:
    asked = Eval(prompts=("a", {"messages": CHAT}), chat=True).asked()
    assert [one.prompt for one in asked] == [[{"role": "user", "content": "a"}], CHAT]


@pytest.mark.parametrize(("entry", "says"), [
    ("", "an empty one"), ({}, "needs `prompt` or `messages`"), ({"prompt": "a", "messages": CHAT}, "one of the two"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "x"}]}, "ends with a turn of the assistant"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(entry: object, says: str) -> None:
    (problem,) = Eval(prompts=("a", entry)).problems()
    assert problem.startswith("eval.prompts: ")
    assert says in problem


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval.prompts_file=.*none.jsonl: cannot be read: No such file"):
        Eval(prompts_file=str(tmp_path / "none.jsonl")).settled()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\nb\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: not JSON"):
        Eval(prompts_file=str(tmp_path / "bad.jsonl")).settled()
