"""A folder that transformers loads: sharded safetensors, config and tokenizer, there as a whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.safetensors import FORMATS, Writer, plan_shards, read_header
from dtrain.checkpoint.storage import WEIGHT, Reader
from dtrain.errors import CheckpointError, ExportError
from dtrain.folders import discard, whole_folder
from dtrain.models.assets import ADAPTER_BASE, ADAPTER_CONFIG, copy_assets
from dtrain.models.base import AbstractWeights

LARGEST_FP16 = 65504.0
Tensors = tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, torch.Tensor]]]
"""Shapes by name, and the tensors one at a time in the same order: each is gone when the next is asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """What the folder of an adapter says of it and of the model that it goes with."""

    config: Mapping[str, Any]
    """Of the adapter, as peft has it, but for where the model is."""
    base: Mapping[str, Any]
    """The model's `path`, `revision`, and `xxh3` of its weights."""

    def write(self, folder: Path) -> None:
        where = {"base_model_name_or_path": self.base["path"], "revision": self.base["revision"]}
        for name, said in ((ADAPTER_CONFIG, {**self.config, **where}), (ADAPTER_BASE, self.base)):
            (folder / name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def write_export(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    to: Path,
    *,
    assets: Path,
    dtype: str,
    max_shard_bytes: float,
    adapter: Adapter | None = None,
) -> None:
    """Write `tensors`, which come one at a time in the order of `shapes`, and only then put `to` in place.

    `adapter`: what a folder that peft loads says of it; None writes one that transformers loads.

    Memory is bounded by the largest tensor. An export that is there is replaced.
    """
    with whole_folder(to) as partial:
        if adapter is None:
            _copy_assets(assets, partial, dtype)
            _write_tensors(tensors, shapes, partial, "model", dtype, max_shard_bytes)
        else:
            copy_assets(assets, partial, but={"config.json", "generation_config.json"})
            _write_tensors(tensors, shapes, partial, "adapter_model", dtype, math.inf)
            adapter.write(partial)
        check_export(partial, shapes)
        if to.exists():
            discard(to)


def with_frozen(tensors: Iterator[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]],
                base: AbstractWeights) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Trained parameters, which come in the order of `shapes`, and between them those that were not trained: as they
    were read, since what is computed with may be rounded.
    """
    trained = next(tensors, None)
    for name, shape in shapes.items():
        if trained is not None and trained[0] == name:
            yield trained
            trained = next(tensors, None)
        else:
            yield name, base.read(name, 0, math.prod(shape)).float().view(shape)
    assert trained is None, trained


def check_export(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Read back what the files say that they hold. Raises ExportError."""
    found = {
        name: entry.shape for file in folder.glob("*.safetensors") for name, (entry, _) in read_header(file).items()
    }
    wrong = [f"{name}: {found.get(name, 'not there')} instead of {shape}" for name, shape in shapes.items()
             if found.get(name) != shape]  # fmt: skip
    if wrong or not found:
        raise ExportError(f"{folder}: not what was to be written: {'; '.join(wrong[:5]) or 'no tensor'}")


def read_export(folder: Path) -> Tensors:
    """What an export holds. Raises ExportError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder}: no *.safetensors in it; give a run, a checkpoint or an exported folder")
    headers = {file: read_header(file) for file in files}
    dtypes = {code: dtype for dtype, code, _ in FORMATS.values()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, entries in headers.items():
        for name, (entry, _) in entries.items():
            if entry.dtype not in dtypes:
                raise ExportError(f"{file}: {name} is {entry.dtype}, which is none of {', '.join(dtypes)}")
            shapes[name] = entry.shape

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        found = [entry for entries in headers.values() for entry, _ in entries.values()]
        memory = torch.empty(max((entry.num_bytes for entry in found), default=0), dtype=torch.uint8)
        for file, entries in headers.items():
            with file.open("rb", buffering=0) as opened:
                for name, (entry, at) in entries.items():
                    raw = memory[: entry.num_bytes]
                    tensor = raw.view(dtypes[entry.dtype]).view(entry.shape)
                    opened.seek(at)
                    into = raw.numpy().data
                    while into:
                        count = opened.readinto(into)
                        if not count:
                            raise ExportError(f"{file}: ended while it was read")
                        into = into[count:]
                    yield name, tensor

    return shapes, tensors()


def read_checkpoint(folder: Path, of: Manifest) -> Tensors:
    """The weights that a checkpoint holds, by the names that an export gives them. Raises CheckpointError."""
    reader = Reader(folder, of)
    shapes = {one.export: one.shape for one in of.parameters.values()}
    if len(shapes) != len(of.parameters):
        raise CheckpointError(f"{folder}: says one name of two parameters for an export")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        try:
            memory = torch.empty(max((math.prod(shape) for shape in shapes.values()), default=0))
            for name, one in of.parameters.items():
                whole = memory[: math.prod(one.shape)]
                reader.read_into(name, WEIGHT, 0, whole)
                yield one.export, whole.view(one.shape)
        finally:
            reader.close()

    return shapes, tensors()


def dtype_of(folder: Path) -> str:
    """Our name of the precision that an export is in. Raises ExportError."""
    try:
        said = json.loads((folder / "config.json").read_text()).get("dtype")
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{folder}/config.json: cannot be read ({error})") from None
    found = [name for name, (dtype, *_) in FORMATS.items() if str(dtype) == f"torch.{said}"]
    if not found:
        raise ExportError(f"{folder}/config.json: dtype={said}: none of {', '.join(FORMATS)}; name one with --dtype")
    return found[0]


def _write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    stem: str,
    dtype: str,
    max_shard_bytes: float,
) -> None:
    files = plan_shards(shapes, dtype, max_shard_bytes)
    titles = (
        [f"{stem}.safetensors"]
        if len(files) == 1
        else [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    source = iter(tensors)
    for title, names in zip(titles, files, strict=True):
        writer = Writer(folder / title, {name: shapes[name] for name in names}, dtype)
        for _ in names:
            name, tensor = next(source)
            if dtype == "fp16" and bool((tensor.abs() > LARGEST_FP16).any()):
                raise ExportError(f"{name}: has elements beyond {LARGEST_FP16:,.0f}, the largest of fp16; use bf16")
            writer.write(name, tensor)
        writer.close()
    assert next(source, None) is None, "more tensors than were announced"
    if len(files) > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * FORMATS[dtype][2]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: title for title, names in zip(titles, files, strict=True) for n in names},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _copy_assets(assets: Path, folder: Path, dtype: str) -> None:
    copy_assets(assets, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(FORMATS[dtype][0]).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
