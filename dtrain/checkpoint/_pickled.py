"""The only place that reads pickles, which can run code: tensors of others by torch's own restricted reader, and the
index of a torch.distributed checkpoint by one that knows a few names and makes inert stand-ins of them.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtrain.errors import CheckpointError

_LARGEST_INDEX = 2**30
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""In the same folder."""


def load(path: Path) -> Any:
    """What torch.save wrote to `path`, as far as it is tensors and plain values. Raises CheckpointError.

    Tensors are mapped: what is not looked at is not read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  what a damaged or hostile file raises is open
        raise _refused(path, error) from None


def load_slice(path: Path, start: int, num_bytes: int) -> torch.Tensor:
    """The tensor that torch.save wrote into these bytes of `path`. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(num_bytes)
        if len(raw) != num_bytes:
            raise EOFError(f"it ends before byte {start + num_bytes:,}")
        found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  as above
        raise _refused(path, error) from None
    if not isinstance(found, torch.Tensor):
        raise CheckpointError(f"{path}: at byte {start:,} there is no tensor")
    return found


class Chunk(NamedTuple):
    """A box of a tensor, and where it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


class Stored(NamedTuple):
    """A tensor of a torch.distributed checkpoint."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_index(path: Path) -> dict[str, Stored]:
    """The tensors that `.metadata` names; other objects are left out. Raises CheckpointError."""
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"{path.stat().st_size:,} bytes, no index is as large")
        with path.open("rb") as file:
            said = _Unpickler(file).load()
        places = {(index.fqn, tuple(getattr(index, "offset", None) or ())): info
                  for index, info in said.storage_data.items()}  # fmt: skip
        return {name: _stored(name, one, places) for name, one in said.state_dict_metadata.items()
                if isinstance(one, _TensorStorageMetadata)}  # fmt: skip
    except Exception as error:  # noqa: BLE001  as above
        raise _refused(path, error) from None


def _stored(name: str, one: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Stored:
    shape, chunks = _sizes(one.size), []
    for chunk in one.chunks:
        offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        info = places[name, offsets]
        file, (start, num_bytes) = info.relative_path, _sizes((info.offset, info.length))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            first + size <= whole for first, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside or not _FILE.fullmatch(str(file)):
            raise ValueError(f"{name}: a part of it lies outside")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name}: is stored in another way than torch.save's: {info.transform_descriptors}")
        chunks.append(Chunk(offsets, sizes, file, start, num_bytes))
    return Stored(shape, tuple(chunks))


def _sizes(of: Any) -> tuple[int, ...]:
    if not isinstance(of, tuple | list) or any(type(size) is not int or size < 0 for size in of):
        raise ValueError(f"{of!r}: no sizes")
    return tuple(of)


class _Plain:
    """Takes whatever attributes the pickle gives it, and does nothing."""


class _TensorStorageMetadata(_Plain): ...


class _TensorProperties:
    def __setstate__(self, state: Any) -> None:
        """Nothing of it is asked: a tensor says its own when it is read."""


def _value(*args: Any) -> Any:
    return args


_METADATA, _DTYPES = "torch.distributed.checkpoint.metadata", ("float64", "float32", "bfloat16", "float16", "int64",
    "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")  # fmt: skip
_KNOWN: Mapping[tuple[str, str], Callable[..., Any] | str] = {
    (_METADATA, "Metadata"): _Plain,
    (_METADATA, "TensorStorageMetadata"): _TensorStorageMetadata,
    (_METADATA, "BytesStorageMetadata"): _Plain,
    (_METADATA, "ChunkStorageMetadata"): _Plain,
    (_METADATA, "MetadataIndex"): _Plain,
    (_METADATA, "StorageMeta"): _Plain,
    (_METADATA, "TensorProperties"): _TensorProperties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _value,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Plain,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _value,
    ("pathlib", "PosixPath"): _value,
    ("pathlib._local", "PosixPath"): _value,
    **{("torch", name): name for name in _DTYPES},
}
"""Everything that an index may name, each with what stands in for it: nothing of torch's is called."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")
        return _KNOWN[module, name]


def _refused(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    # What torch says of a refusal ends with how to switch its checks off; its cause says what was refused.
    cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return CheckpointError(f"{path}: not read: {lines[0]}")
