"""Where the values of parameters come from: safetensors files, or the model's own rules for a fresh start."""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models.base import AbstractWeights

_SHOWN = 5
"""Names that a message lists before it counts the rest."""


@final
class SafetensorsWeights(AbstractWeights):
    """Of a folder with `model.safetensors`, or shards and their index. Reads the rows that a range touches."""

    def __init__(self, folder: Path, stored: Mapping[str, tuple[str, Path]], shapes: Mapping[str, torch.Size]) -> None:
        """`stored`: parameter name -> (name in the file, file). Use `open` for a folder that is not checked yet."""
        self.folder = folder
        self._stored = stored
        self._shapes = shapes
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path, params: Mapping[str, torch.Size], names: Names) -> SafetensorsWeights:
        """Match the parameters with what the folder has; raises ModelError that lists what does not match."""
        files = stored_files(folder)
        stored, problems = _match(list(params), list(files), names)
        weights = cls(folder, {name: (key, files[key]) for name, key in stored.items()}, params)
        wrong = [
            f"{name}: {list(shape)} in the model, {weights._shape(name)} in the files"
            for name, shape in params.items()
            if name in stored and tuple(weights._shape(name)) != tuple(shape)
        ]
        if wrong:
            problems.append(f"of another shape: {_listed(wrong)}")
        if problems:
            raise ModelError(f"{folder}: the weights do not match the model of config.json\n  " + "\n  ".join(problems))
        return weights

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        shape = self._shapes[name]
        values = self._slice(name)
        if not shape:
            return values[...].reshape(-1)[start : start + numel]
        width = max(1, shape[1:].numel())
        first, last = start // width, -(-(start + numel) // width)
        flat = values[first:last].reshape(-1)
        return flat[start - first * width :][:numel]

    def _shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        key, path = self._stored[name]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt", device="cpu").__enter__()
        return self._files[path].get_slice(key)


class Names:
    """How the names in a checkpoint may differ from those of the module."""

    def __init__(self, *, prefix: str, tied: Iterable[str], ignored: Sequence[str]) -> None:
        """`prefix`: of the decoder; a checkpoint of the base model leaves it out. `tied`: further names of parameters
        that the module has under another one. `ignored`: regular expressions of names that may be left over.
        """
        self.prefix = prefix
        self.tied = set(tied)
        self.ignored = ignored

    def inside(self, name: str, keys: set[str]) -> str | None:
        """The name of this parameter among `keys`, if it is there."""
        bare = name.removeprefix(self.prefix + ".")
        return next((key for key in (name, bare, f"{self.prefix}.{name}") if key in keys), None)

    def is_spare(self, key: str) -> bool:
        """Whether a checkpoint may have this name without the module using it."""
        import re

        return key in self.tied or any(re.search(pattern, key) for pattern in self.ignored)


def stored_files(folder: Path) -> dict[str, Path]:
    """Which file of a checkpoint folder has each tensor. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({path.name for path in files.values() if not path.is_file()})
        if absent:
            raise ModelError(
                f"{folder}: {index.name} names files that are not there: {_listed(absent)}; fetch them again"
            )
        return files
    if not single.is_file():
        raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    try:
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except SafetensorError as e:
        raise ModelError(f"{single}: not a readable safetensors file ({e}); fetch it again") from e


def _match(params: list[str], keys: list[str], names: Names) -> tuple[dict[str, str], list[str]]:
    """Parameter name -> name in the files, and what is wrong."""
    have = set(keys)
    found = {name: key for name in params if (key := names.inside(name, have)) is not None}
    missing = [name for name in params if name not in found]
    spare = have - set(found.values())
    if len(missing) == 1 and (alias := sorted(spare & names.tied)):
        # A tied checkpoint may hold the shared tensor under its other name only.
        found[missing.pop()] = alias[0]
    unexpected = sorted(key for key in have - set(found.values()) if not names.is_spare(key))
    problems = [f"missing in the files: {_listed(missing)}"] if missing else []
    if unexpected:
        problems.append(f"in the files and not in the model: {_listed(unexpected)}")
    return found, problems


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more ({len(names)} in all)" if rest > 0 else "")


Rules = Callable[[Sequence[nn.Module]], None]
"""Draw the values of the first module's own parameters; the others are what holds it, up to the root."""


@final
class FreshWeights(AbstractWeights):
    """What the model's own rules give when training starts from nothing.

    The values of a module depend on the seed and its name only: not on who reads, in which order, or how much. Keeps
    the values of the last two modules.
    """

    def __init__(self, model: nn.Module, seed: int, by: Rules | None = None) -> None:
        """`model` is on meta and is not wrapped later: its rules are run on one module at a time. `by`: them; those of
        transformers where there are none.
        """
        self._model = model
        self._seed = seed
        self._by = by or _of_transformers
        self._kept: collections.OrderedDict[str, dict[str, torch.Tensor]] = collections.OrderedDict()

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner not in self._kept:
            while len(self._kept) > 1:
                self._kept.popitem(last=False)
            self._kept[owner] = self._make(owner)
        self._kept.move_to_end(owner)
        return self._kept[owner][leaf].reshape(-1)[start : start + numel]

    def _make(self, owner: str) -> dict[str, torch.Tensor]:
        """The values of one module's own parameters.

        Runs the rules of the module and then of each that holds it, as the model does on a whole one; what they do to
        other parameters falls on meta.
        """
        chain = list(_ancestors(self._model, owner))
        module = chain[0]
        values = {
            name: nn.Parameter(torch.zeros(p.shape, dtype=torch.float32), requires_grad=False)
            for name, p in module.named_parameters(recurse=False)
        }
        with _replaced(module, values), seeded(self._seed, owner), torch.no_grad():
            self._by(chain)
        return {name: value.data for name, value in values.items()}


def _ancestors(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module of this name, then what holds it, up to the root."""
    yield root.get_submodule(name)
    while name:
        name = name.rpartition(".")[0]
        yield root.get_submodule(name)


def _of_transformers(chain: Sequence[nn.Module]) -> None:
    from transformers import PreTrainedModel

    for i, holder in enumerate(chain):
        model = next(module for module in chain[i:] if isinstance(module, PreTrainedModel))
        model._init_weights(holder)


@contextlib.contextmanager
def _replaced(module: nn.Module, values: Mapping[str, nn.Parameter]) -> Iterator[None]:
    before = copy.copy(module._parameters)
    module._parameters.update(values)
    try:
        yield
    finally:
        module._parameters.update(before)


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """The CPU's generator seeded by both, and put back: rules for fresh values know no other generator."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
