"""Prompts that a model cannot go on with are refused before any rank is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from dtrain.config.compose import compose
from dtrain.config.validate import validate
from dtrain.errors import DataError
from dtrain.verbs._prompts import check
from tests.unit.data.fakes import CHATML, write_tokenizer


def _check(folder: Path, template: str | None, *typed: str) -> str:
    write_tokenizer(folder, template)
    (folder / "config.json").write_text('{"max_position_embeddings": 20}')
    config = validate(compose(["objective=pretrain", *typed]).values)
    try:
        check(dataclasses.replace(config, eval=config.eval.settled()), SimpleNamespace(assets=folder))  # type: ignore[arg-type]
    except DataError as error:
        return str(error)
    return ""


def test_those_that_leave_no_room(tmp_path: Path) -> None:
    said = _check(tmp_path, None, f'eval.prompts=["the cat", "{"the cat sat on the mat " * 9}"]')
    assert said.startswith("eval.prompts[1]: ")
    assert said.endswith(" tokens, and the model has 20 positions; shorten it")


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    typed = ('eval.prompts=["the cat"]', "eval.chat=true")
    assert "eval.prompts[0]: a conversation, and the tokenizer has no chat template" in _check(tmp_path, None, *typed)
    assert _check(tmp_path, CHATML, *typed) == ""


def test_a_model_with_outputs_of_its_own_writes_nothing(tmp_path: Path) -> None:
    said = _check(tmp_path, None, 'eval.prompts=["the cat"]', "objective=reward")
    assert said == ("eval.prompts: objective=reward gives the model outputs of its own in place of a vocabulary, so it "
                    "writes nothing; leave them out")  # fmt: skip
