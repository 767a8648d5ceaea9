"""What decides the result, and whether a run of another length is another run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from dtrain.checkpoint.identity import Difference, differences, identity, same_course
from dtrain.plan.propose import configure
from dtrain.schedules.constant import Constant
from dtrain.schedules.cosine import Cosine
from dtrain.schedules.linear import Linear
from dtrain.schedules.wsd import WSD


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assets")
    config = {"hidden_size": 64, "rope": {"theta": 1e4}, "transformers_version": "5.0", "architectures": ["X"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@functools.cache
def _identity(assets: Path, *typed: str, data: str = "d") -> dict:
    return identity(configure(list(typed), None)[0], data=data, tokenizer="t", assets=assets)


def test_what_is_in_it(assets: Path) -> None:
    found = _identity(assets, "objective=pretrain")
    assert found["optim"] == "dtrain.optims.adamw.AdamW"
    assert (found["data"], found["tokenizer"], found["run.seed"]) == ("d", "t", 0)
    assert (found["model.hidden_size"], found["model.rope.theta"]) == (64, 1e4)
    assert {"train.steps", "train.precision", "train.grad_clip", "batch.global_batch", "objective", "tuning",
            "schedule.warmup_steps", "optim.lr"} <= found.keys()  # fmt: skip
    assert "model.transformers_version" not in found


@pytest.mark.parametrize("typed", ["strategy=ddp", "launcher.procs=3", "batch.micro_batch=1", "run.name=other", "run.dir=x",
                                   "tracker=[]", "eval.every_steps=7", "checkpoint.every_steps=5", "export.dtype=bf16",
                                   "train.activation_checkpointing=true", "device=cpu"])  # fmt: skip
def test_what_changes_nothing(assets: Path, typed: str) -> None:
    assert differences(_identity(assets), _identity(assets, typed), same_course=False) == []


@pytest.mark.parametrize(("typed", "key"), [
    ("optim.lr=0.5", "optim.lr"), ("run.seed=3", "run.seed"), ("train.steps=7", "train.steps"),
    ("batch.global_batch=24", "batch.global_batch"), ("train.grad_clip=0.5", "train.grad_clip"),
    ("train.precision=bf16", "train.precision"), ("schedule.warmup_steps=77", "schedule.warmup_steps"),
    ("objective=sft", "objective"),
])  # fmt: skip
def test_what_changes_the_result(assets: Path, typed: str, key: str) -> None:
    found = differences(_identity(assets), _identity(assets, typed), same_course=False)
    assert key in [one.key for one in found]
    group = key.split(".")[0]
    assert all(one.allowed([group]) for one in found if one.key.split(".")[0] == group)


def test_differences_are_listed() -> None:
    before = {"optim.lr": 0.1, "optim.betas": [0.9, 0.95], "data": "a", "optim.old": 1}
    now = {"optim.lr": 0.2, "optim.betas": (0.9, 0.95), "data": "a", "optim.new": 2}
    found = differences(before, now, same_course=False)
    assert list(map(str, found)) == [
        "optim.lr: was 0.1, is 0.2",
        "optim.new: was None, is 2",
        "optim.old: was 1, is None",
    ]


def test_allowed_by_key_and_by_group() -> None:
    one = Difference("optim.lr", 1, 2)
    assert one.allowed(["optim.lr"])
    assert one.allowed(["data", "optim"])
    assert not one.allowed(["opti"])
    assert not one.allowed(["optim.l"])
    assert not one.allowed(["optim.lr.x"])
    assert not one.allowed([])


@pytest.mark.parametrize(("schedule", "steps", "done", "same"), [
    (Constant(), (100, 200), 50, True),
    (Constant(warmup_steps=10), (100, 50), 20, True),
    (Cosine(), (100, 200), 50, False),
    (Cosine(warmup_steps=60), (100, 200), 50, True),  # all of it was warm-up
    (Linear(), (100, 200), 50, False),
    (Constant(), (100, 200), 100, True),
    (Constant(), (100, 200), 101, False),  # the shorter one never got there
    (WSD(decay_fraction=0.2), (100, 200), 81, True),  # step 80, the first of the decay, still has the whole rate
    (WSD(decay_fraction=0.2), (100, 200), 82, False),
    (WSD(decay_fraction=0.2), (200, 100), 82, False),
])  # fmt: skip
def test_same_course(schedule, steps: tuple[int, int], done: int, same: bool) -> None:
    assert same_course(schedule, steps, done) is same


def test_a_longer_run_of_the_same_course_is_no_difference() -> None:
    before, now = {"train.steps": 100, "data": "a"}, {"train.steps": 200, "data": "b"}
    assert [one.key for one in differences(before, now, same_course=True)] == ["data"]
    assert [one.key for one in differences(before, now, same_course=False)] == ["train.steps", "data"]
