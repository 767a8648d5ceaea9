"""Checkpoints of tuned models: with the model that they were tuned from, which they name and do not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dtrain.checkpoint.export import Adapter, Tensors, with_frozen
from dtrain.checkpoint.storage import WEIGHT, Reader
from dtrain.errors import ExportError

if TYPE_CHECKING:
    from dtrain.checkpoint.manifest import Manifest
    from dtrain.models.base import ModelBundle


def base_of(model: object, digest: str | None, *, adapter: bool, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint says of the weights that it does not hold. `start`: `path` and `xxh3` of the adapter that its
    losses compared with besides; None where they compared with these weights alone, or with none.
    """
    path, revision = getattr(model, "path", None) or None, getattr(model, "revision", None)
    if path is not None and Path(path).is_dir():
        path = str(Path(path).resolve())
    return {"path": path, "revision": revision, "xxh3": digest, "adapter": adapter, "start": start}


def compared_with(config: Mapping[str, Any]) -> str | None:
    """The folder of the adapter with which the model was at the start, where the losses compared with it so. `config`:
    settled, as plain data.
    """
    tuning, kind = config["tuning"], config["objective"].get("reference")
    if kind == "auto":
        without = "copy" if config["dataset"]["streaming"] else "cached"
        kind = without if tuning.get("modules_to_save") else "adapters"
    return (tuning.get("init_from") or None) if kind == "cached" else None


def check_base(said: Mapping[str, Any], digest: str | None, folder: Path) -> None:
    """Raises ExportError where `folder` holds other weights than those that were tuned."""
    if said.get("xxh3") is not None and digest != said["xxh3"]:
        raise ExportError(f"{folder}: not the model that was tuned: the xxh3 of its weights is {digest}, not "
                          f"{said['xxh3']} of {said.get('path')}; give the right one with --base")  # fmt: skip


class Parts(NamedTuple):
    """Of what an export writes."""

    tensors: Tensors
    adapter: Adapter | None
    """None for a whole model."""


def read_tuned(folder: Path, of: Manifest, bundle: ModelBundle, *, merge: bool) -> Parts:
    """The adapter alone, or the whole model with what was learned in it. `bundle`: of the tuned model, on meta. Raises
    CheckpointError, ExportError.
    """
    reader = Reader(folder, of)

    def learned(name: str) -> torch.Tensor:
        one = of.parameters[name]
        out = torch.empty(math.prod(one.shape))
        reader.read_into(name, WEIGHT, 0, out)
        return out.view(one.shape)

    shapes = {name: tuple(param.shape) for name, param in bundle.module.named_parameters()}
    other = sorted(set(of.parameters) - set(shapes))
    if other:
        raise ExportError(f"{folder}: holds {other[0]}, which this model has not: it is of another one")

    adapter = bundle.adapter
    if adapter is not None and not merge:
        tensors = _closing(adapter.tensors(learned), reader)
        return Parts((dict(adapter.shapes()), tensors), Adapter(adapter.config, dict(of.base or {})))
    if adapter is not None and adapter.apart is not None:
        raise ExportError(f"--merge: {adapter.apart}")
    if adapter is not None:
        return Parts((dict(adapter.merged_shapes()), _closing(adapter.merged(learned), reader)), None)
    name_of = bundle.export_name
    whole = with_frozen(((name, learned(name)) for name in shapes if name in of.parameters), shapes, bundle.weights)
    named = ((name_of(name), tensor) for name, tensor in whole)
    return Parts(({name_of(name): shape for name, shape in shapes.items()}, _closing(named, reader)), None)


def _closing(tensors: Iterator[tuple[str, torch.Tensor]], reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from tensors
    finally:
        reader.close()
