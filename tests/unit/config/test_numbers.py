"""Every number of the schema, whatever the group and the choice: found from the schema itself, so that a new one is tried too."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from typing import Any

import pytest

from dtrain.config.compose import choices, compose
from dtrain.config.spec import GROUPS
from dtrain.config.validate import SECTIONS, find_spec, validate
from dtrain.errors import ConfigError, UserError

NOTHING = object()


def _numbers(cls: type) -> list[str]:
    """Fields that take a number and no text."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [field.name for field in dataclasses.fields(cls) if (kinds := _kinds(hints[field.name])) & {int, float}
            and not kinds & {str, Any}]  # fmt: skip


def _kinds(hint: Any) -> set[Any]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return {type(one) for one in typing.get_args(hint) if not isinstance(one, str)}
    if origin in (typing.Union, __import__("types").UnionType):
        return set().union(*(_kinds(one) for one in typing.get_args(hint)))
    return {hint}


def _cases() -> list[tuple[str, str, str | None, str]]:
    """Group or section, overrides that choose, and the key."""
    found = [(name, "", key) for name, cls in SECTIONS.items() for key in _numbers(cls)]
    seen = set()
    for group, names in choices().items():
        for choice in names if group in GROUPS else []:
            typed = f"{group}=[{choice}]" if group == "tracker" else f"{group}={choice}"
            values = compose([typed]).values[group]
            path = f"tracker.{choice}" if group == "tracker" else group
            cls = find_spec((values[choice] if group == "tracker" else values)["_target_"], group, ())
            if cls not in seen:
                seen.add(cls)
                found += [(path, typed, key) for key in _numbers(cls)]
    return found


CASES = _cases()
_composed: dict[str, dict[str, Any]] = {}


def _set(path: str, typed: str, key: str, value: object) -> dict[str, Any]:
    if typed not in _composed:
        _composed[typed] = compose([typed] if typed else []).values
    data = copy.deepcopy(_composed[typed])
    section = data
    for part in path.split("."):
        section = section.setdefault(part, {})
    section[key] = value
    for one, other in (("steps", "epochs"), ("global_batch", "global_tokens")):
        if key in (one, other):
            section[other if key == one else one] = None
    return data


def _said(path: str, typed: str, key: str, value: object) -> str:
    try:
        validate(_set(path, typed, key, value))
    except ConfigError as error:
        return str(error)
    return ""


def test_there_are_numbers() -> None:
    assert {"train.steps", "optim.lr", "model.hidden", "strategy.stage", "dataset.max_length", "launcher.procs",
            "batch.micro_batch"} <= {f"{path}.{key}" for path, _, key in CASES}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "typed", "key"), CASES, ids=[f"{typed}.{key}" if typed else f"{path}.{key}" for path, typed, key in CASES]
)
def test_what_no_number_may_be(path: str, typed: str, key: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1, -0.5, "abc", True, [1], {"a": 1}, 10**400):
        said = _said(path, typed, key, value)
        assert said, f"{path}.{key}={value!s:.60} was accepted"
        assert f"{path}.{key}" in said or f"{path}: every size" in said, said
        assert "Input should" not in said
        assert "Traceback" not in said


ZERO = {"run.seed", "train.grad_clip", "train.compare_every", "eval.every_steps", "eval.fraction", "checkpoint.every_steps", "optim.weight_decay",
        "dataset.max_bad_fraction", "launcher.gpus_per_node", "launcher.max_restarts", "launcher.restart_wait_s",
        "launcher.last_call_s", "schedule.warmup_steps", "schedule.min_factor", "schedule.decay_fraction",
        "strategy.prefetch_bucket_size", "strategy.param_persistence_threshold", "strategy.max_reuse_distance",
        "tuning.dropout", "tuning.warmup", "tuning.final", "tuning.orthogonality", "objective.label_smoothing",
        "objective.gamma"}  # fmt: skip
"""Keys for which 0 means something."""


@pytest.mark.parametrize(
    ("path", "typed", "key"), CASES, ids=[f"{typed}.{key}" if typed else f"{path}.{key}" for path, typed, key in CASES]
)
def test_zero(path: str, typed: str, key: str) -> None:
    said = "\n".join(line for line in _said(path, typed, key, 0).splitlines() if ": not given" not in line)
    assert bool(said) == (f"{path}.{key}" not in ZERO), said or f"{path}.{key}=0 was accepted"


def test_huge_but_finite_is_told_by_the_plan() -> None:
    from dtrain.plan.propose import propose

    for typed in ("model.hidden=80000000", "batch.global_batch=100000000000", "model.layers=1000000000"):
        try:
            propose([typed, "strategy=ddp", "device=cpu"], None)
        except UserError as error:
            assert "Traceback" not in str(error)
