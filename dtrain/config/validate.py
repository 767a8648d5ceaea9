"""Plain values to a frozen `Config`, with all that is wrong collected and said once."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dtrain.config.compose import nearest
from dtrain.config.schema import Batch, Checkpoint, Config, Eval, Export, Run, Train
from dtrain.config.spec import GROUPS, AbstractSpec
from dtrain.errors import ConfigError

SECTIONS: dict[str, type] = {
    "run": Run, "train": Train, "batch": Batch, "eval": Eval, "checkpoint": Checkpoint, "export": Export,
}  # fmt: skip
_SCALARS = ("device", "device_memory_gb", "plugins")


def validate(data: Mapping[str, Any], *, plugins: Sequence[str] = (), found: Sequence[str] = ()) -> Config:
    """The configuration of a run, or ConfigError with every problem. `plugins`: packages that `_target_` may name
    besides dtrain; from the command line, never from a file. `found`: problems met before, to be told with the rest."""
    keys = [*GROUPS, *SECTIONS, *_SCALARS]
    problems = [*found, *(f"{key}: unknown key{nearest(key, keys)}" for key in data if key not in keys)]
    values: dict[str, Any] = {}
    for group in GROUPS:
        entry = data.get(group)
        if group == "tracker":
            values[group] = _trackers(entry, plugins, problems)
        else:
            values[group] = _spec(group, group, entry, plugins, problems)
    for name, cls in SECTIONS.items():
        entry = data.get(name)
        values[name] = _section(name, cls, {} if entry is None else entry, problems)
    values.update(_scalars(data, problems))
    for part in (*values.values(), *(values["tracker"] or {}).values()):
        if part is not None and hasattr(part, "problems"):
            problems += part.problems()
    if problems:
        raise ConfigError.of(problems)
    return Config(**values)


def validate_spec(group: str, entry: Mapping[str, Any], *, plugins: Sequence[str] = ()) -> AbstractSpec:
    """One spec of a group from what its file says. Raises ConfigError."""
    problems: list[str] = []
    spec = _spec(group, group, entry, plugins, problems)
    if spec is None or problems:
        raise ConfigError.of(problems)
    return spec


def _scalars(data: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    device, memory = data.get("device", "auto"), data.get("device_memory_gb")
    if device not in ("auto", "cpu", "cuda"):
        problems.append(f"device={device}: not one of auto, cpu, cuda")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or memory <= 0):
        problems.append(f"device_memory_gb={memory}: not a positive number of GiB")
    return {"device": device, "device_memory_gb": memory, "plugins": tuple(data.get("plugins") or ())}


def find_spec(target: object, group: str, plugins: Sequence[str]) -> type[AbstractSpec]:
    """The spec class that `_target_` names, checked to be one of this group. Raises ConfigError."""
    base = GROUPS[group]
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{group}._target_={target}: not the name of a spec, as in dtrain.{group}s.name.Class")
    package = target.split(".", 1)[0]
    allowed = ["dtrain", *plugins]
    if package not in allowed:
        raise ConfigError(f"{group}._target_={target}: only specs of {', '.join(allowed)} are imported by name; "
                          f"type plugins=[{package}] on the command line to allow your own package")  # fmt: skip
    module, name = target.rsplit(".", 1)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"{group}._target_={target}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{group}._target_={target}: not a {base.__name__}")
    return found


def _spec(group: str, path: str, entry: object, plugins: Sequence[str], problems: list[str]) -> AbstractSpec | None:
    if not isinstance(entry, Mapping):
        problems.append(f"{path}={entry}: choose one of the group, as in {group}=<choice>; see `dtrain launch --help`")
        return None
    try:
        cls = find_spec(entry.get("_target_"), group, plugins)
    except ConfigError as error:
        problems.append(str(error))
        return None
    found = _section(path, cls, {key: value for key, value in entry.items() if key != "_target_"}, problems)
    assert found is None or isinstance(found, AbstractSpec)
    return found


def _trackers(entry: object, plugins: Sequence[str], problems: list[str]) -> dict[str, Any]:
    if entry is None:
        return {}
    if not isinstance(entry, Mapping):
        problems.append(f"tracker={entry}: a list of choices, as in tracker=[console,jsonl]")
        return {}
    return {str(name): _spec("tracker", f"tracker.{name}", one, plugins, problems) for name, one in entry.items()}


def _section(path: str, cls: type, entry: object, problems: list[str]) -> Any:
    if not isinstance(entry, Mapping):
        problems.append(f"{path}={entry}: a section, not a value; its keys: {', '.join(_fields(cls))}")
        return None
    try:
        return cls(**{str(key): value for key, value in entry.items()})
    except ValidationError as error:
        problems += [_problem(path, cls, one) for one in error.errors()]
        return None


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _problem(path: str, cls: type, error: Any) -> str:
    """One pydantic error in our words: key, value, reason, way out."""
    where = [str(part) for part in error["loc"]]
    fields = _fields(cls)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        ours = getattr(cls, "elsewhere", {}).get(where[0]) if len(where) == 1 else None
        if ours:
            return f"{path}.{where[0]}: dtrain settles this itself; use {ours}"
        hint = nearest(where[-1], fields) if len(where) == 1 else ""
        return f"{path}.{'.'.join(where)}: unknown key{hint or '; there are: ' + ', '.join(fields)}"
    key = where[0] if where else ""
    value = error.get("input")
    if error["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{path}.{key}: not given, and there is no default"
    reason = _REASONS.get(error["type"], error["msg"])
    context = error.get("ctx") or {}
    return f"{path}.{key}={value}: {reason.format(**{k: str(v) for k, v in context.items()}) if '{' in reason else reason}"


_REASONS = {
    "int_parsing": "not a whole number",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "bool_parsing": "neither true nor false",
    "bool_type": "neither true nor false",
    "string_type": "not a text",
    "literal_error": "not one of {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "has characters that are not allowed; the pattern is {pattern}",
}
