"""What a checkpoint says of itself. It is written last: a folder without it is not a checkpoint. No torch here."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError
from dtrain.runs.files import dumps

NAME = "manifest.json"
FORMAT, VERSION = "dtrain-checkpoint", 1
LARGEST_BYTES = 2**28
"""Of a manifest: it holds a line for each parameter and each rank."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    bytes: int
    xxh3: str
    """xxh3_64 of the content, in hexadecimal digits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    shape: tuple[int, ...]
    states: tuple[str, ...]
    """What is stored of it: `weight`, and each optimizer state by its name."""
    export: str
    """Its name in an exported folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    step: int
    """Optimizer steps done."""
    progress: Mapping[str, Any]
    """Samples, tokens and targets consumed, losses: the engine's own state."""
    counters: Mapping[str, float]
    """Of the strategy: optimizer updates, the loss scale."""
    parameters: Mapping[str, Parameter]
    """Every trained parameter, in the order of the module."""
    tied: Mapping[str, str]
    """Further names of parameters, and the name under which they are stored."""
    metrics: Mapping[str, float]
    """At this step; what retention and people choose by."""
    identity: Mapping[str, Any]
    """What decides the mathematics of the run; see `checkpoint.identity`."""
    config: Mapping[str, Any]
    """The settled configuration: for people, never resolved."""
    made_by: Mapping[str, Any]
    """Strategy, number of ranks, attempt, versions, time."""
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder by its name, or None where it is not one's."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def dump(manifest: Manifest) -> bytes:
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    return dumps({**fields, "xxh3": _digest(fields)}, indent=1).encode() + b"\n"


def read(folder: Path) -> Manifest:
    """Of the checkpoint in `folder`. Raises CheckpointError, naming the file and what is wrong with it."""
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, no manifest is as large")
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so this is no complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a checkpoint")
    if fields.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {fields.get('version')} of the format, this dtrain reads {VERSION}: "
                              f"use the dtrain that wrote it")  # fmt: skip
    said = fields.pop("xxh3", None)
    if said != _digest(fields):
        raise CheckpointError(f"{path}: was changed after it was written (its digest differs)")
    names = {field.name for field in dataclasses.fields(Manifest)}
    try:
        made = {name: value for name, value in fields.items() if name in names}
        made["files"] = {name: File(**one) for name, one in made["files"].items()}
        made["parameters"] = {name: Parameter(tuple(one["shape"]), tuple(one["states"]), one["export"])
                              for name, one in made["parameters"].items()}  # fmt: skip
        manifest = Manifest(**made)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not whole ({error!r})") from None
    outside = [name for name in manifest.files if not _FILE.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}, which is no file of this folder; nothing of it is read")
    return manifest


def _digest(fields: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(json.dumps(json.loads(dumps(fields)), sort_keys=True).encode())
