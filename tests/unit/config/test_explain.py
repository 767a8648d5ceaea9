"""`dtrain config explain`: of keys, sections, groups and choices, whatever is chosen."""

from __future__ import annotations

import pytest

from dtrain.cli import run


@pytest.mark.parametrize(("typed", "said"), [
    ("train.grad_clip", "train.grad_clip\n  type     float at least 0\n  default  1.0\n  value    1.0\n"),
    ("checkpoint", "checkpoint.async = True  (bool)"),
    ("strategy", "  fsdp2  Fully sharded (torch fully_shard)"),
    ("tracker", "  console  Progress on the screen"),
    ("experiment", "  smoke "),
    ("experiment.smoke", "  smoke  Ten steps"),
    ("objective.dpo", "objective.beta = 0.1  (float more than 0)"),
    ("dataset.hub", "dataset.name = ???"),
    ("model.llama1b", "model.path = meta-llama/Llama-3.2-1B  (str)"),
    ("tuning.rank", "tuning.rank\n  type     int at least 1\n  default  16\n  value    16\n"),
    ("tuning.rank", "of tuning=lora, tuning=qlora, tuning=adalora; the value is that of lora"),
])  # fmt: skip
def test_told(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "explain", typed]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "said"), [
    ("learning_rate", "learning_rate: no such key; here it is optim.lr"),
    ("tuning.nope", "tuning.nope: no such key"),
    ("experiment.nope", "experiment.nope: no such key"),
    ("a.b.c", "a.b.c: no such key"),
])  # fmt: skip
def test_refused(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "explain", typed]) == 2
    assert said in capsys.readouterr().err
