"""A settled configuration on disk: what every rank reads, whatever was typed to get it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.config.compose import dump_yaml, load_yaml
from dtrain.config.schema import Config
from dtrain.config.spec import AbstractSpec
from dtrain.config.validate import validate
from dtrain.errors import ConfigError


def to_plain(config: Config) -> dict[str, Any]:
    """A Config as plain data that `validate` takes back to the same Config."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def digest(config: Config) -> str:
    """Of every value; ranks compare it before they start."""
    return hashlib.sha256(json.dumps(to_plain(config), sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, config: Config) -> None:
    path.write_text(
        "# Settled by dtrain; every rank reads this file.\n" + dump_yaml(to_plain(config)), encoding="utf-8"
    )


def read(path: Path, *, plugins: Sequence[str]) -> Config:
    """What `write` wrote. Raises ConfigError."""
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a configuration")
    return validate(data, plugins=plugins)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if not dataclasses.is_dataclass(value):
        return value
    plain = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, AbstractSpec):
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
    return plain
