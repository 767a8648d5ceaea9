"""Values of a row, checked and named in messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dtrain.datasets.badrows import BadRowError

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null", int: "a number",
          float: "a number"}  # fmt: skip


def kind(value: Any) -> str:
    """In words."""
    number = isinstance(value, int | float)  # also one of numpy's
    return _KINDS.get(type(value)) or (_KINDS[int] if number else f"a {type(value).__name__}")


def kinds(types: Iterable[type]) -> str:
    """In words, of which one may be; null where there are none."""
    exact = {**_KINDS, int: "a whole number", float: "a decimal number"}
    return " or ".join(exact.get(one, f"a {one.__name__}") for one in types) or _KINDS[type(None)]


def listed(names: Iterable[Any]) -> str:
    """The first few."""
    every = [f"`{name}`" for name in names]
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "") or "nothing"


def string(value: Any, name: str) -> str:
    """Raises BadRowError where it is none, or has what no text has."""
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {kind(value)} instead of a string")
    if "\0" in value:
        raise BadRowError(f"{name} has a NUL: at character {value.index(chr(0)) + 1}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"{name} has half a surrogate pair: at character {error.start + 1}") from error
    return value


def filled(value: Any, name: str) -> str:
    """A string that is not blank. Raises BadRowError."""
    if not string(value, name).strip():
        raise BadRowError(f"{name} is empty")
    return value


def optional(value: Any, name: str) -> str:
    """A string, empty where there is none. Raises BadRowError."""
    return "" if value is None else string(value, name)


def from_json(value: Any, name: str) -> Any:
    """What a column holds as a value or as JSON in a string. Raises BadRowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{name} is not JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """Columnar files give each object the keys of all, null where it has none."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
