"""Functions of a user's own, which a value names as `module:function`, and what an import of their module meets."""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.config.compose import clip
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
        raise error(f"{key}={named}: {why_not_imported(raised, module)}") from raised
    if not callable(found):
        raise error(f"{key}={named}: {module} has no function {name}")
    function: Callable[..., Any] = found
    return function


def why_not_imported(error: Exception, module: str) -> str:
    """What the import of a user's module met, in words."""
    if isinstance(error, ModuleNotFoundError):
        where = "; install it, or put its folder into PYTHONPATH" if error.name == module.partition(".")[0] else ""
        return f"{error}{where}"
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__} while it was imported: {clip(error, 300)}{at}"
