"""Writing safetensors tensor by tensor: the library's own writer wants a whole file's tensors in memory at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, final

import torch

DTYPES = {"fp32": (torch.float32, "F32", 4), "bf16": (torch.bfloat16, "BF16", 2), "fp16": (torch.float16, "F16", 2)}
"""By our name: torch's, the format's, bytes of an element."""


def plan_shards(shapes: Mapping[str, Sequence[int]], dtype: str, max_bytes: float) -> list[list[str]]:
    """Names by file, in order, so that no file is larger than `max_bytes` unless one tensor alone is."""
    files: list[list[str]] = []
    room = 0.0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPES[dtype][2]
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
        self._torch_dtype, code, size = DTYPES[dtype]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * size
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._names: Iterator[tuple[str, Sequence[int]]] = iter(shapes.items())
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

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
