"""A network of one's own: what it starts from, how it is divided, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtrain.cli import run as dtrain
from dtrain.errors import ModelError
from dtrain.models.python import Python

SOURCE = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.scale

class Rule(Scaled):
    def reset_parameters(self):
        nn.init.constant_(self.scale, 3.0)

class Several(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first = nn.Linear(4, size)
        self.rest = nn.ModuleList([nn.Linear(size, size), nn.ReLU(), Rule(size)])
        self.attention = nn.MultiheadAttention(size, 2)

def several(size=6):
    return Several(size)

def ruleless():
    return nn.Sequential(nn.Linear(4, 4), Scaled(4))

def stateful():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

def nothing():
    return nn.ReLU()

def breaks(size):
    raise ValueError("no such size")
"""
NAME = "dtrain_test_net:"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "dtrain_test_net.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("dtrain_test_net", None)


def test_units_and_counts(tmp_path: Path) -> None:
    spec = Python(function=NAME + "several", args={"size": 6})
    assets = spec.assets(lambda: (), tmp_path)
    assert spec.assets(lambda: (), tmp_path) == assets != Python(function=NAME + "several").assets(lambda: (), tmp_path)
    bundle = spec.build(assets, seed=1)
    names = {unit: name for name, unit in bundle.module.named_modules()}
    assert [names[unit] for unit in bundle.blocks] == ["first", "rest.0", "rest.2", "attention"]
    assert all(param.is_meta and param.dtype == torch.float32 for param in bundle.module.parameters())
    figures = spec.figures()
    # 4 * 6 + 6, 6 * 6 + 6, 6, and of attention 3 * 6 * 6 + 3 * 6 + 6 * 6 + 6.
    assert (figures.num_params, figures.num_block_params) == (30 + 42 + 6 + 168, 168)


def test_values_are_those_of_its_rules_by_seed_and_name_alone() -> None:
    def read(seed: int, name: str, start: int, numel: int) -> torch.Tensor:
        return Python(function=NAME + "several").build(Path(), seed=seed).weights.read(name, start, numel)

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    whole = read(1, "rest.0.weight", 0, 36)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(read(1, "rest.0.weight", 7, 5), whole[7:12])
    assert not torch.equal(read(2, "rest.0.weight", 0, 36), whole)
    assert 0 < float(whole.abs().max()) < 6**-0.5
    assert read(1, "rest.2.scale", 0, 6).tolist() == [3.0] * 6
    # What holds it has the last word, as when torch makes the whole: attention starts with biases of zero.
    assert read(1, "attention.out_proj.bias", 0, 6).tolist() == [0.0] * 6
    assert float(read(1, "attention.in_proj_weight", 0, 108).abs().max()) > 0


@pytest.mark.parametrize(("name", "said"), [
    ("ruleless", "1 (Scaled) has parameters and no reset_parameters()"),
    ("stateful", "keeps state outside its parameters (1.running_mean, 1.running_var, 1.num_batches_tracked)"),
    ("nothing", "gave ReLU instead of a torch.nn.Module with parameters"),
    ("Scaled", "TypeError: "),
    ("none", "dtrain_test_net has no function none"),
])  # fmt: skip
def test_what_is_no_network(name: str, said: str) -> None:
    with pytest.raises(ModelError) as error:
        Python(function=NAME + name).figures()
    assert f"model.function={NAME}{name}: " in str(error.value)
    assert said in str(error.value)


def test_where_a_function_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        Python(function=NAME + "breaks", args={"size": 4}).figures()
    assert str(error.value) == (
        f"model.function={NAME}breaks: ValueError: no such size ({tmp_path}/dtrain_test_net.py:{_line('raise')})"
    )


def _line(text: str) -> int:
    return next(i for i, line in enumerate(SOURCE.splitlines(), 1) if text in line)


@pytest.mark.parametrize(("typed", "said"), [
    (["tuning=lora"], "tuning=lora: of a network of your own no more is known than its parameters; use tuning=full"),
    (["model.function=x"], "model.function=x: not module:function, as in my_package.net:make"),
    (["plugins=[]"], "plugins=[dtrain_test_net] on the command line"),
])  # fmt: skip
def test_refused_before_anything_starts(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "plan",
        "model=python",
        f"model.function={NAME}several",
        "plugins=[dtrain_test_net]",
        "device=cpu",
        "launcher.procs=2",
    ]
    assert dtrain([*given, "train.steps=1"]) == 0
    out = capsys.readouterr().out
    assert "0.0 M parameters, all trained; a network of your own\n" in out
    assert "by formula, without activations, for micro-batches of 8 (" in out
    assert "note: activations are not counted, " in out
    assert ", and batch.micro_batch=auto takes 8 by them; where memory runs out, set batch.micro_batch=N or " in out
    assert dtrain([*given, "train.steps=1", "batch.micro_batch=3"]) == 0
    out = capsys.readouterr().out
    assert "; `dtrain rehearse` tries batch.micro_batch=3\n" in out
    assert "micro_batch=auto" not in out
    assert dtrain([*given, "train.steps=1", *typed]) == 2
    assert said in capsys.readouterr().err
