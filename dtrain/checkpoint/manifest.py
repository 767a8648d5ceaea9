"""What a checkpoint says of itself. It is written last: a folder without it is not a checkpoint. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from dtrain.errors import CheckpointError
from dtrain.runs.files import dumps

NAME = "manifest.json"
FORMAT, VERSION = "dtrain-checkpoint", 1
LARGEST_BYTES = 2**26
"""Of a manifest: it holds some lines for each parameter and each rank, a few hundred bytes."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP = re.compile(r"step-([0-9]{8,})")
_END = re.compile(rb' "xxh3": "([0-9a-f]{16})"\n}\n\Z')
"""The last line tells the digest of all bytes before it."""
_Count = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    bytes: _Count
    xxh3: str
    """xxh3_64 of the content, in hexadecimal digits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    shape: tuple[_Count, ...]
    states: tuple[str, ...]
    """What is stored of it: `weight`, and each optimizer state by its name."""
    export: str
    """Its name in an exported folder."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors, which are fp32."""
        return 4 * math.prod(self.shape) * len(self.states)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    step: _Count
    """Optimizer steps done."""
    progress: Mapping[str, Any]
    """Samples, tokens and targets consumed, losses: the engine's own state."""
    counters: Mapping[str, Annotated[float, Field(ge=0)]]
    """Of the strategy: `updates` of the optimizer, the loss scale."""
    parameters: Mapping[str, Parameter]
    """Every trained parameter, in the order of the module."""
    tied: Mapping[str, str]
    """Further names of parameters, and the name under which they are stored."""
    metrics: Mapping[str, float | None]
    """At this step, None where not a number; what retention and people choose by."""
    identity: Mapping[str, Any]
    """What decides the mathematics of the run; see `checkpoint.identity`."""
    config: Mapping[str, Any]
    """The settled configuration: for people, never resolved."""
    made_by: Mapping[str, Any]
    """Strategy, number of ranks, attempt, versions, time."""
    base: Mapping[str, Any] | None = None
    """Of the weights that are not trained and so not here: `path`, `revision`, and `xxh3` of their content. None where
    all are here."""
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder by its name, or None where it is not one's."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match and folder.name == folder_name(int(match[1])) else None


def dump(manifest: Manifest) -> bytes:
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    raw = dumps(fields, indent=1).removesuffix("\n}").encode() + b",\n"
    return raw + f' "xxh3": "{_digest(raw)}"\n}}\n'.encode()


def read(folder: Path) -> Manifest:
    """Of the checkpoint in `folder`. Raises CheckpointError, naming the file and what is wrong with it."""
    path = folder / NAME
    raw = _content(path)
    try:
        fields = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a checkpoint")
    if fields.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {fields.get('version')} of the format, this dtrain reads {VERSION}: "
                              f"use the dtrain that wrote it")  # fmt: skip
    end = _END.search(raw, max(0, len(raw) - 64))
    if end is None or end[1].decode() != _digest(raw[: end.start()]):
        raise CheckpointError(f"{path}: was changed after it was written (its digest differs)")
    try:
        manifest = _adapter().validate_json(raw, strict=True)
    except (ValidationError, RecursionError) as error:
        raise CheckpointError(f"{path}: not whole ({_in_words(error)})") from None
    if "updates" not in manifest.counters:
        raise CheckpointError(f"{path}: not whole (counters.updates: missing)")
    outside = [name for name in manifest.files if not _FILE.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}, which is no file of this folder; nothing of it is read")
    return manifest


@functools.cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _content(path: Path) -> bytes:
    """Of a plain file of bearable size."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: {'a link' if stat.S_ISLNK(found.st_mode) else 'no file'}, so this is no "
                                  f"checkpoint")  # fmt: skip
        if found.st_size > LARGEST_BYTES:
            raise CheckpointError(f"{path}: {found.st_size:,} bytes, no manifest is as large")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so this is no complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _in_words(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _digest(raw: bytes) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(raw)
