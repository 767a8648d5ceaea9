"""Checkpoints that others wrote, as one of dtrain's: weights and optimizer state, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint._pickled import Stored, load, load_slice, read_index
from dtrain.checkpoint.manifest import Manifest, Parameter
from dtrain.checkpoint.safetensors import Entry, header, plan_shards
from dtrain.checkpoint.storage import WEIGHT, file_name, key_of, write_chunks
from dtrain.errors import CheckpointError
from dtrain.folders import whole_folder
from dtrain.runs.folder import utc

FILE_BYTES = 4e9
"""Of one file, unless a single tensor is larger: ranks share the files when they look at what is in them."""
_MODEL_STATES = re.compile(r"(bf16_)?(zero_pp_rank_0_)?mp_rank_00_model_states\.pt")
_OPTIMIZER_KEY = re.compile(r"(?:.*\.)?state\.(?P<name>.+)\.(?P<state>[A-Za-z_0-9]+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of another tool."""

    path: Path
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter that has optimizer state."""
    states: tuple[str, ...]
    """Of the optimizer, of each parameter."""
    read: Callable[[str, str], torch.Tensor]
    """A parameter's `weight`, or one of its states, whole."""
    updates: int | None
    """That the optimizer has taken; None where it does not say."""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Tensors of the model without optimizer state: buffers, frozen parameters, further names of tied ones."""


def open_source(path: Path) -> Source:
    """A universal checkpoint of DeepSpeed or a folder of torch.distributed.checkpoint. Raises CheckpointError."""
    try:
        if (path / ".metadata").is_file():
            return _distributed(path)
        if (path / "zero").is_dir():
            return _universal(path)
        native = any(path.glob("*_model_states.pt"))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not as its tool writes it ({error!r})") from None
    if native:
        raise CheckpointError(f"{path}: DeepSpeed's own layout, for one number of ranks; make a universal checkpoint "
                              f"of it: python -m deepspeed.checkpoint.ds_to_universal --input_folder {path} "
                              f"--output_folder DIR")  # fmt: skip
    raise CheckpointError(f"{path}: no universal checkpoint of DeepSpeed (a folder with zero/), and none of "
                          f"torch.distributed.checkpoint (a folder with .metadata)")  # fmt: skip


def _universal(path: Path) -> Source:
    """zero/NAME/{fp32,exp_avg,...}.pt; stage 3 leaves the tensors flat, and their shapes to the model's own file."""
    said = _model_states(path)
    shapes = {name: tuple(map(int, shape)) for group in said["param_shapes"] for name, shape in group.items()}
    there = {folder.name: {file.stem for file in folder.glob("*.pt")} for folder in (path / "zero").iterdir()
             if folder.is_dir()}  # fmt: skip
    trained = [name for name in shapes if there.get(name, set()) - {"fp32", "step"}]
    states = _same_states(path, {name: there[name] - {"fp32", "step"} for name in trained})
    prefix = "module." if all(name.startswith("module.") for name in trained) else ""

    def read(name: str, state: str) -> torch.Tensor:
        file = path / "zero" / f"{prefix}{name}" / f"{'fp32' if state == WEIGHT else state}.pt"
        one = load(file)
        return _checked(file, one["param"] if isinstance(one, dict) else one, shapes[prefix + name])

    steps = {int(load(path / "zero" / name / "step.pt")) for name in trained if "step" in there[name]}
    tied = {name.removeprefix(prefix): kept.removeprefix(prefix)
            for name, kept in (said.get("shared_params") or {}).items()}  # fmt: skip
    return Source(
        path, "DeepSpeed universal", {name.removeprefix(prefix): shapes[name] for name in trained}, states, read,
        _same_step(path, steps or {int(said["global_steps"]) - int(said["skipped_steps"])}), tied,
        tuple(name for name in sorted({*there} - {*trained}) if name.removeprefix(prefix) not in tied),
    )  # fmt: skip


def _model_states(path: Path) -> Mapping[str, Any]:
    """What the first rank keeps besides its optimizer."""
    files = sorted(one for one in path.iterdir() if _MODEL_STATES.fullmatch(one.name))
    if not files:
        raise CheckpointError(f"{path}: has no mp_rank_00_model_states.pt, which says the shapes")
    said: Mapping[str, Any] = load(files[0])
    degrees = {"mp_world_size": said.get("mp_world_size"), **(said.get("checkpoint_parallel_dimensions") or {})}
    split = [f"{key}={degree}" for key, degree in degrees.items() if degree not in (None, 1)]
    if split:
        raise CheckpointError(f"{path}: made with tensor or pipeline parallelism ({', '.join(split)}), which is not "
                              f"supported")  # fmt: skip
    return said


def _distributed(path: Path) -> Source:
    """Optimizer state by the names of parameters, as torch.distributed.checkpoint.state_dict gives it, and the model's
    under any prefix.
    """
    index = read_index(path / ".metadata")
    found: dict[str, dict[str, str]] = {}
    for key in index:
        if match := _OPTIMIZER_KEY.fullmatch(key):
            found.setdefault(match["name"], {})[match["state"]] = key
    prefix = _prefix(path, [*index], [*found])
    shapes = {name: index[prefix + name].shape for name in found}
    keys = {(name, WEIGHT): prefix + name for name in found}
    keys |= {(name, state): key for name, states in found.items() for state, key in states.items() if state != "step"}
    states = _same_states(path, {name: set(states) - {"step"} for name, states in found.items()})
    in_order = [key.removeprefix(prefix) for key in index if key.startswith(prefix)]
    steps = {int(_assembled(path, index[states["step"]])) for states in found.values() if "step" in states
             if states["step"] in index}  # fmt: skip

    def read(name: str, state: str) -> torch.Tensor:
        key = keys[name, state]
        return _checked(path / key, _assembled(path, index[key]), shapes[name])

    return Source(
        path, "torch.distributed.checkpoint", {name: shapes[name] for name in in_order if name in shapes}, states, read,
        _same_step(path, steps) if steps else None,
        left_out=tuple(name for name in in_order if name not in shapes and not _OPTIMIZER_KEY.fullmatch(prefix + name)),
    )  # fmt: skip


def _prefix(path: Path, keys: Sequence[str], names: Sequence[str]) -> str:
    """What stands before the names of parameters in the keys of their weights."""
    if not names:
        raise CheckpointError(f"{path}: no optimizer state by the names of parameters (keys such as "
                              f"optimizer.state.NAME.exp_avg); save what "
                              f"torch.distributed.checkpoint.state_dict.get_state_dict gives")  # fmt: skip
    weights = {key for key in keys if not _OPTIMIZER_KEY.fullmatch(key)}
    possible = {key.removesuffix(names[0]) for key in weights if key == names[0] or key.endswith(f".{names[0]}")}
    found = sorted(prefix for prefix in possible if all(prefix + name in weights for name in names))
    if len(found) != 1:
        missing = [name for name in names if not any(key == name or key.endswith(f".{name}") for key in weights)]
        problem = (f"the weights are there more than once, under {', '.join(map(repr, found))}" if found else
                   f"no weights for the optimizer state of {', '.join(missing[:3]) or 'all parameters'}")  # fmt: skip
        raise CheckpointError(f"{path}: {problem}")
    return found[0]


def _assembled(path: Path, stored: Stored) -> torch.Tensor:
    """The chunks as one tensor. Raises CheckpointError where they are not all of it."""
    if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.shape):
        raise CheckpointError(f"{path}: a tensor of shape {stored.shape} is not whole")
    whole: torch.Tensor | None = None
    for chunk in stored.chunks:
        part = load_slice(path / chunk.file, chunk.start, chunk.num_bytes)
        if tuple(part.shape) != chunk.sizes:
            raise CheckpointError(f"{path / chunk.file}: has a tensor of shape {tuple(part.shape)} where the index has "
                                  f"one of {chunk.sizes}")  # fmt: skip
        if chunk.sizes == stored.shape:
            return part
        if whole is None:
            whole = torch.empty(stored.shape, dtype=part.dtype)
        whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))] = part
    return torch.empty(stored.shape) if whole is None else whole


def _checked(where: Path, tensor: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise CheckpointError(f"{where}: {found} instead of fp32: masters and optimizer state are fp32 here, and "
                              f"nothing is converted")  # fmt: skip
    if tuple(tensor.shape) not in (shape, (math.prod(shape),)):
        raise CheckpointError(f"{where}: of shape {tuple(tensor.shape)} instead of {shape}")
    return tensor


def _same_states(path: Path, states: Mapping[str, set[str]]) -> tuple[str, ...]:
    if not states:
        raise CheckpointError(f"{path}: no parameter with optimizer state")
    first, expected = next(iter(states.items()))
    for name, mine in states.items():
        if mine != expected:
            raise CheckpointError(f"{path}: {name} has the optimizer state {', '.join(sorted(mine)) or 'none'}, and "
                                  f"{first} has {', '.join(sorted(expected)) or 'none'}")  # fmt: skip
    return tuple(sorted(expected))


def _same_step(path: Path, steps: set[int]) -> int:
    if len(steps) != 1:
        raise CheckpointError(
            f"{path}: parameters were updated {min(steps)} to {max(steps)} times; one number is needed"
        )
    return steps.pop()


def write(source: Source, to: Path, *, step: int, samples: int) -> Manifest:
    """Make the checkpoint `to`, which is not there yet. `samples`: rows that the run has consumed. Raises
    CheckpointError.

    Nothing is known of the run that made the source, so that `identity` and `config` are empty.
    """
    keys = {key_of(name, state, [0] * len(shape)): (name, state)
            for name, shape in source.shapes.items() for state in (WEIGHT, *source.states)}  # fmt: skip
    shapes = {key: source.shapes[name] for key, (name, _) in keys.items()}
    _check_room(to, sum(4 * math.prod(shape) for shape in shapes.values()))
    try:
        with whole_folder(to) as making:
            files = {}
            for i, group in enumerate(plan_shards(shapes, "fp32", FILE_BYTES)):
                entries = {key: Entry("F32", shapes[key]) for key in group}
                chunks = _chunks(header(entries), source, [keys[key] for key in group])
                files[file_name(i)] = write_chunks(making / file_name(i), chunks)
            made = dataclasses.replace(_describe(source, step, samples), files=files)
            (making / manifest.NAME).write_bytes(manifest.dump(made))
    except OSError as error:
        raise CheckpointError(f"{to}: cannot be written ({error.strerror})") from None
    return made


def _describe(source: Source, step: int, samples: int) -> Manifest:
    """All but the files."""
    parameters = {
        name: Parameter(tuple(shape), (WEIGHT, *source.states), name) for name, shape in source.shapes.items()
    }
    return Manifest(
        step=step, progress={"step": step, "samples": samples}, parameters=parameters, tied=source.tied, metrics={},
        counters={"updates": step if source.updates is None else source.updates}, identity={}, config={},
        made_by={"imported": str(source.path.absolute()), "kind": source.kind, "time": utc()},
    )  # fmt: skip


def _chunks(head: bytes, source: Source, of: Sequence[tuple[str, str]]) -> Iterator[bytes | memoryview]:
    yield head
    for name, state in of:
        tensor = source.read(name, state).contiguous().view(-1)
        yield tensor.view(torch.uint8).numpy().data


def _check_room(to: Path, need: int) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(to.parent).free
    if free < need:
        raise CheckpointError(f"{to}: {need / 1e9:,.3f} GB are needed, and {free / 1e9:,.3f} GB are free")
