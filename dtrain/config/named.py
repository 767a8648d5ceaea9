"""Functions of a user's own, which a value names as `module:function`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.errors import UserError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def problems(key: str, named: str, example: str) -> list[str]:
    """What is wrong with the name alone."""
    if named == "???":
        return [f"{key}: not given; name yours, as in {key}={example}"]
    return [] if _NAME.fullmatch(named) else [f"{key}={named}: not module:function, as in {example}"]


def packages(key: str, named: str) -> Mapping[str, str]:
    """As `AbstractSpec.packages`."""
    return {f"{key}={named}": named.partition(":")[0].partition(".")[0]} if _NAME.fullmatch(named) else {}


def find(key: str, named: str, error: type[UserError]) -> Callable[..., Any]:
    """Raises `error`: also for a name that `packages` could not read, of which nothing is imported."""
    if not _NAME.fullmatch(named):
        raise error(f"{key}={named}: not module:function")
    module, _, name = named.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as raised:  # what a user's module raises at import is its own affair
        raise error(f"{key}={named}: {type(raised).__name__} while {module} was imported: {raised}") from raised
    if not callable(found):
        raise error(f"{key}={named}: {module} has no function {name}")
    function: Callable[..., Any] = found
    return function
