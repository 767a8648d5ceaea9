"""A script for a scheduler from a template, in which no value can become shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtrain.config.compose import shared_dir
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.config.spec import LauncherSpec


class _Shell(str):
    """Text that is shell already."""

    __slots__ = ()


def render(launcher: LauncherSpec, template: str | None, values: Mapping[str, Any]) -> str:
    """The template with `values`, each quoted for the shell; `| shell` leaves one as it is. Raises ConfigError.

    Without `template` it is the launcher's own, in `launch/`.
    """
    path = Path(template) if template else shared_dir() / "launch" / f"{type(launcher).__name__.lower()}.sh.j2"
    jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_quoted, trim_blocks=True,
                                          lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    jinja.filters["shell"] = _Shell
    try:
        return jinja.from_string(path.read_text(encoding="utf-8")).render(values)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(f"launcher.template={path}: {error}" + (f" (line {line})" if line else "")) from error


def _quoted(value: Any) -> str:
    if isinstance(value, _Shell):
        return value
    if isinstance(value, str | int | float | Undefined):
        return shlex.quote(str(value))  # which raises for a name that is not there
    raise ConfigError(f"launcher.template: a value of {type(value).__name__} where text belongs; take its items")
