"""The safetensors format, piece by piece: the library's own writer wants all of a file in memory at once, and its own
reader makes a copy of what it reads.

https://github.com/huggingface/safetensors#format: 8 bytes of length, a header in JSON, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

import torch

from dtrain.errors import CheckpointError
from dtrain.models.base import DTYPES

FORMATS = {"fp32": (DTYPES["fp32"], "F32", 4), "bf16": (DTYPES["bf16"], "BF16", 2), "fp16": (DTYPES["fp16"], "F16", 2)}
"""By our name: torch's, the format's, bytes of an element."""
_ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
_LARGEST_HEADER = 10**8


class Entry(NamedTuple):
    """A tensor of a file."""

    dtype: str
    """The format's name of it."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def header(entries: Mapping[str, Entry]) -> bytes:
    """All of a file that comes before the data of these tensors, which follow in this order without gaps."""
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        said[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    raw = json.dumps(said, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_header(path: Path) -> dict[str, tuple[Entry, int]]:
    """Every tensor of the file, with the place of its first byte. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            said = json.loads(file.read(length))
        found = {}
        for name, one in said.items():
            if name == "__metadata__":
                continue
            entry = Entry(str(one["dtype"]), tuple(int(n) for n in one["shape"]))
            if entry.dtype not in _ELEMENT_BYTES:
                raise ValueError(f"{name} is of {entry.dtype}, which is none of {', '.join(_ELEMENT_BYTES)}")
            begin, end = (int(at) for at in one["data_offsets"])
            if begin < 0 or end - begin != entry.num_bytes or 8 + length + end > size:
                raise ValueError(f"{name} does not lie within it")
            found[name] = (entry, 8 + length + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    return found


def plan_shards(shapes: Mapping[str, Sequence[int]], dtype: str, max_bytes: float) -> list[list[str]]:
    """Names by file, in order, so that no file is larger than `max_bytes` unless one tensor alone is."""
    files: list[list[str]] = []
    room = 0.0
    for name, shape in shapes.items():
        size = math.prod(shape) * FORMATS[dtype][2]
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


@final
class Writer:
    """One safetensors file; tensors are given in the order of `shapes`. Flushed to disk when closed."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
        self._torch_dtype, code, _ = FORMATS[dtype]
        self._names: Iterator[tuple[str, Sequence[int]]] = iter(shapes.items())
        self._file: BinaryIO = path.open("wb")
        self._file.write(header({name: Entry(code, tuple(shape)) for name, shape in shapes.items()}))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        due, shape = next(self._names)
        assert (name, tuple(tensor.shape)) == (due, tuple(shape)), (name, tuple(tensor.shape), due, tuple(shape))
        raw = tensor.to(self._torch_dtype).contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)

    def close(self) -> None:
        assert next(self._names, None) is None, "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
