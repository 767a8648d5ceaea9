"""What each key means: its type, its default, its value and the words that stand under it in the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dtrain.config.compose import clip, conf_dir, group_choice
from dtrain.config.schema import Config
from dtrain.config.spec import GROUPS, AbstractSpec
from dtrain.config.validate import choices_with, find_spec


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    name: str
    type: str
    default: str
    value: Any
    doc: str

    def line(self) -> str:
        return f"{self.name} = {_in_line(self.value)}  ({self.type})"

    def text(self) -> str:
        """For the screen, a few lines."""
        about = textwrap.fill(self.doc, 100) if self.doc else "(the name says it)"
        return f"{self.name}\n  type     {self.type}\n  default  {self.default}\n  value    {self.value}\n\n{about}"


def keys(config: Config) -> dict[str, Key]:
    """Every key that can be set for what is chosen in this configuration."""
    found: dict[str, Key] = {}
    docs = _docs(Config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, dict):
            for name, one in value.items():
                found |= _keys(f"{field.name}.{name}", one)
        elif dataclasses.is_dataclass(value):
            found |= _keys(field.name, value)
        else:
            found[field.name] = Key(
                field.name, _type(Config, field.name), _default(field), value, docs.get(field.name, "")
            )
    return found


def schema_lines(config: Config) -> list[str]:
    lines: list[str] = []
    section = ""
    for key in keys(config).values():
        head = key.name.rsplit(".", 1)[0] if "." in key.name else ""
        if head != section:
            lines += ["", f"[{head}]" if head else "[top level]"]
            section = head
        name, about = key.name.rsplit(".", 1)[-1], f"  # {_first(key.doc)}" if key.doc else ""
        lines.append(f"  {name}: {key.type} = {_in_line(key.value)}{about}")
    return lines[1:]


def of_choice(group: str, choice: str, extra: Path | None, plugins: Sequence[str] = ()) -> dict[str, Key]:
    """Every key of a choice, with the values of its file; it need not be chosen, nor complete. An
    experiment has none of its own. Raises ConfigError.
    """
    if group not in GROUPS:
        return {}
    entry = group_choice(group, choice, extra)
    cls = find_spec(entry.get("_target_"), group, plugins)
    return _keys_of(group, cls, lambda field: entry.get(field.name, _default(field)))


def with_key(name: str, extra: Path | None, plugins: Sequence[str] = ()) -> dict[str, Key]:
    """The key `group.key` of each choice that has it, by the choice, those with short names first."""
    group, _, key = name.partition(".")
    return {choice: of_choice(group, choice, extra, plugins)[name]
            for choice in choices_with(key, group, extra, plugins)}  # fmt: skip


def group_lines(group: str, names: Sequence[str], extra: Path | None) -> list[str]:
    """A line for each choice of a group: what the first words of its file say."""
    width = max(map(len, names), default=0)
    columns = max(60, min(120, shutil.get_terminal_size().columns))
    return [line for name in names
            for line in textwrap.wrap(_about(group, name, extra) or "(its file says nothing)", columns,
                                      initial_indent=f"  {name:<{width}}  ",
                                      subsequent_indent=" " * (width + 4))]  # fmt: skip


def _about(group: str, choice: str, extra: Path | None) -> str:
    path = next(path for root in (conf_dir(), extra) if root and (path := root / group / f"{choice}.yaml").is_file())
    lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return next((line for line in lines if not line.startswith("@package")), "")


def _keys(path: str, value: Any) -> dict[str, Key]:
    return _keys_of(path, type(value), lambda field: getattr(value, field.name))


def _keys_of(path: str, cls: type, value: Callable[[dataclasses.Field[Any]], Any]) -> dict[str, Key]:
    docs = _docs(cls)
    typed: Mapping[str, str] = {field: key for key, field in getattr(cls, "spelled", {}).items()}
    names = [(f"{path}.{typed.get(field.name, field.name)}", field) for field in dataclasses.fields(cls)]
    return {
        name: Key(name, _type(cls, field.name), _default(field), value(field), docs.get(field.name, ""))
        for name, field in names
    }


def _default(field: dataclasses.Field[Any]) -> str:
    factory = getattr(field.default, "default_factory", None)
    if factory is not None:
        return str(factory())
    default = getattr(field.default, "default", field.default)
    return "none, it must be given" if default is dataclasses.MISSING else str(default)


def _type(cls: type, name: str) -> str:
    """An annotation in words: `int at least 1 or auto`."""
    for base in cls.__mro__:
        if name in inspect.get_annotations(base):
            annotation = inspect.get_annotations(base)[name]
            return _words(_evaluate(annotation, base))
    return "any"


def _evaluate(annotation: Any, base: type) -> Any:
    if not isinstance(annotation, str):
        return annotation
    return typing.get_type_hints(base, include_extras=True).get(_name_of(base, annotation), annotation)


def _name_of(base: type, annotation: str) -> str:
    return next(str(name) for name, one in inspect.get_annotations(base).items() if one is annotation)


def _words(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *rest = typing.get_args(annotation)
        limits = [word for one in rest for word in _limits(one)]
        return " ".join([_words(inner), *limits])
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if one is type(None) else _words(one) for one in typing.get_args(annotation))
    if origin is not None:
        inner = ", ".join(_words(one) for one in typing.get_args(annotation) if one is not Ellipsis)
        return f"{origin.__name__} of {inner}"
    if inspect.isclass(annotation) and issubclass(annotation, AbstractSpec):
        return f"one of the group {annotation.group}"
    return getattr(annotation, "__name__", str(annotation))


def _limits(field: Any) -> list[str]:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return [f"{words[name]} {getattr(one, name)}" for one in getattr(field, "metadata", ())
            for name in words if getattr(one, name, None) is not None]  # fmt: skip


def _docs(cls: type) -> dict[str, str]:
    """The string that stands under each field, in this class and those it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("builtins", "abc")):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, after in pairwise(body):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)):  # fmt: skip
                found[field.target.id] = " ".join(after.value.value.split())
    return found


def _in_line(value: object) -> object:
    return clip(value) if isinstance(value, str) else value


def _first(doc: str) -> str:
    return re.split(r"(?<=\.)\s", doc)[0]
