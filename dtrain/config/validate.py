"""Plain values to a frozen `Config`, with all that is wrong collected and said once."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtrain.config.compose import choices, clip, group_choice, nearest
from dtrain.config.named import why_not_imported
from dtrain.config.names import NAMES
from dtrain.config.schema import Batch, Checkpoint, Config, Eval, Export, Resume, Run, Train
from dtrain.config.spec import GROUPS, AbstractSpec
from dtrain.errors import ConfigError

SECTIONS: dict[str, type] = {
    "run": Run, "train": Train, "batch": Batch, "eval": Eval, "checkpoint": Checkpoint, "resume": Resume,
    "export": Export,
}  # fmt: skip
NOT_HERE = "not a key of this choice"
_LARGEST = 2**63 - 1
_SCALARS = ("device", "device_memory_gb", "plugins")


def validate(data: Mapping[str, Any], *, plugins: Sequence[str] = (), found: Sequence[str] = ()) -> Config:
    """The configuration of a run, or ConfigError with every problem. `plugins`: packages that `_target_` may name
    besides dtrain; from the command line, never from a file. `found`: problems met before, to be told with the rest.
    """
    keys = [*GROUPS, *SECTIONS, *_SCALARS]
    problems = [*found, *(f"{clip(key)}: unknown key{_meant(key, keys, inside=False)}"
                          for key in data if key not in keys)]  # fmt: skip
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
        if isinstance(part, AbstractSpec):
            problems += not_allowed(part, plugins, "plugins=[{}] on the command line")
    if problems:
        raise ConfigError.of(problems)
    return Config(**values)


def not_allowed(part: AbstractSpec, plugins: Sequence[str], way: str) -> list[str]:
    """Packages that it would import and that nobody has allowed; `way`: what is to be typed, with {} for one."""
    return [f"{key}: {package} is imported only where it is allowed; if it is a package of your own, type "
            f"{way.format(package)}" for key, package in part.packages().items() if package not in plugins]  # fmt: skip


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
        problems.append(f"device={clip(device)}: not one of auto, cpu, cuda")
    if memory is not None and (
        isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < math.inf
    ):
        problems.append(f"device_memory_gb={clip(memory)}: not a positive number of GiB")
    return {"device": device, "device_memory_gb": memory, "plugins": packages(data.get("plugins"), problems)}


def packages(entry: object, problems: list[str]) -> tuple[str, ...]:
    """The names in `plugins`, as a list or as one."""
    entry = [entry] if isinstance(entry, str) else entry or []
    if not isinstance(entry, list | tuple) or not all(isinstance(name, str) and name.isidentifier() for name in entry):
        problems.append(f"plugins={clip(entry)}: a list of names of packages, as in plugins=[my_package]")
        return ()
    return tuple(entry)


def find_spec(target: object, group: str, plugins: Sequence[str], path: str = "") -> type[AbstractSpec]:
    """The spec class that `_target_` names, checked to be one of this group. Raises ConfigError."""
    base, key = GROUPS[group], f"{path or group}._target_={clip(target)}"
    if not isinstance(target, str) or "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{key}: not the name of a spec, as in my_package.module.Class")
    package = target.split(".", 1)[0]
    allowed = ["dtrain", *plugins]
    if package not in allowed:
        raise ConfigError(f"{key}: only specs of {', '.join(allowed)} are imported by name; if {package} is a package "
                          f"of your own, type plugins=[{package}] on the command line")  # fmt: skip
    module, name = target.rsplit(".", 1)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # what a plugin's module raises at import is its own affair
        raise ConfigError(f"{key}: {why_not_imported(error, module)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key}: not a {base.__name__}")
    if inspect.isabstract(found):
        raise ConfigError(f"{key}: lacks {', '.join(sorted(found.__abstractmethods__))}")
    return found


def choices_with(key: str, group: str, extra: Path | None = None, plugins: Sequence[str] = ()) -> list[str]:
    """Choices of a group that have this key, short names first."""
    if group not in GROUPS:  # sections and experiments have no choices with keys
        return []
    found = []
    for choice in sorted(choices(extra)[group], key=len):
        try:
            cls = find_spec(group_choice(group, choice, extra).get("_target_"), group, plugins)
        except ConfigError:  # a choice of a package that is not allowed here
            continue
        found += [choice] if key in _fields(cls) else []
    return found


def _spec(group: str, path: str, entry: object, plugins: Sequence[str], problems: list[str]) -> AbstractSpec | None:
    if not isinstance(entry, Mapping):
        said = path if entry is None else f"{path}={clip(entry)}"
        problems.append(f"{said}: choose one of the group, as in {group}=<choice>; see `dtrain launch --help`")
        return None
    try:
        cls = find_spec(entry.get("_target_"), group, plugins, path)
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
        problems.append(f"tracker={clip(entry)}: a list of choices, as in tracker=[console,jsonl]")
        return {}
    return {str(name): _spec("tracker", f"tracker.{name}", one, plugins, problems) for name, one in entry.items()}


def _section(path: str, cls: type, entry: object, problems: list[str]) -> Any:
    if not isinstance(entry, Mapping):
        problems.append(f"{path}={clip(entry)}: a section, not a value; its keys: {', '.join(_fields(cls))}")
        return None
    spelled = getattr(cls, "spelled", {})
    both = [key for key, field in spelled.items() if key in entry and field in entry]
    problems += [f"{path}.{key}: also given as {path}.{spelled[key]}; leave one of them out" for key in both]
    values = {spelled.get(str(key), str(key)): value for key, value in entry.items()}
    try:
        made = cls(**values)
    except ValidationError as error:
        problems += _problems(path, cls, error)
        return None
    except TypeError as error:  # a key that is no Python name for a field, such as `self`
        problems.append(f"{path}: {error}")
        return None
    flags = [
        key for key, value in values.items() if isinstance(value, bool) and not isinstance(getattr(made, key), bool)
    ]
    problems += [f"{path}.{key}={str(values[key]).lower()}: neither true nor false can be set here" for key in flags]
    huge = [key for key, value in values.items() if isinstance(value, int) and abs(value) > _LARGEST]
    problems += [f"{path}.{key}={clip(values[key], 40)}: too large; no such number has a use" for key in huge]
    return None if flags or huge else made


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _problems(path: str, cls: type, error: ValidationError) -> list[str]:
    """What pydantic found, in our words: key, value, reason, way out. A line for each key."""
    found: list[str] = []
    reasons: dict[str, list[tuple[object, str]]] = {}
    fields = _fields(cls)
    for one in error.errors():
        where = [str(part) for part in one["loc"]] or ["?"]
        if one["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            found.append(f"{path}.{'.'.join(where)}: {_unknown(cls, where, fields)}")
        elif one["type"] in ("missing", "missing_keyword_only_argument"):
            found.append(f"{path}.{where[0]}: not given, and there is no default")
        else:
            reasons.setdefault(where[0], []).append((one.get("input"), _reason(one)))
    for key, each in reasons.items():
        words = list(dict.fromkeys(reason for _, reason in each))
        found.append(f"{path}.{key}={clip(each[0][0])}: {' and '.join(words)}")
    return found


def _unknown(cls: type, where: Sequence[str], fields: Sequence[str]) -> str:
    if len(where) > 1:
        return "unknown key"
    ours = getattr(cls, "elsewhere", {}).get(where[0])
    if ours:
        return f"unknown key; here it is {ours}"
    if others := choices_with(where[0], getattr(cls, "group", "")):
        few = f"{', '.join(others[:3])}{' and others' * (len(others) > 3)}"
        return f"{NOT_HERE}; there is one with {cls.group}={few}"  # type: ignore[attr-defined]
    return f"unknown key{_meant(where[0], fields)}"


def _meant(key: str, keys: Sequence[str], *, inside: bool = True) -> str:
    """What may have been meant by a key that is none of `keys`, those of a section where it stands `inside` of one."""
    known = NAMES.get(str(key).lower().replace("-", "_"), "")
    homes = " or ".join(f"{section}.{key}" for section, cls in SECTIONS.items() if key in _fields(cls))
    near = nearest(key, keys)
    for said in (known, near, homes) if inside else (known, homes, near):
        if said:
            return said if said is near else f"; here it is {said}"
    return f"; there are: {', '.join(keys) or 'none'}"


def _reason(error: Any) -> str:
    said = _REASONS.get(error["type"])
    if said is None:
        return str(error["msg"]).replace("Input should be ", "not ")
    said = said.format(**{key: str(value) for key, value in (error.get("ctx") or {}).items()})
    return said.replace("not ", "not one of ", 1) if error["type"] == "literal_error" and " or " in said else said


_REASONS = {
    "int_parsing": "not a whole number",
    "int_parsing_size": "not a whole number of a usual size",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "bool_parsing": "neither true nor false",
    "bool_type": "neither true nor false",
    "string_type": "not a text",
    "list_type": "not a list",
    "tuple_type": "not a list",
    "dict_type": "not a mapping of keys to values",
    "literal_error": "not {expected}",
    "greater_than_equal": "not at least {ge}",
    "greater_than": "not more than {gt}",
    "less_than": "not less than {lt}",
    "less_than_equal": "not at most {le}",
    "too_short": "needs at least {min_length}",
    "too_long": "takes at most {max_length}",
    "string_pattern_mismatch": "has characters that are not allowed; the pattern is {pattern}",
}
