"""Layers that peft adds to a model on meta, what they start from, and how they are merged. The room of peft.

Values are peft's own: one layer at a time is made again on the CPU, with peft's rules, so that no rank ever holds a
model, and the values depend on the seed and the layer's name alone.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import fnmatch
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models._weights import seeded
from dtrain.models.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dtrain.models.base import AbstractAdapter, AbstractWeights, ModelBundle
from dtrain.tuning._parts import near

if TYPE_CHECKING:
    from peft import PeftConfig

    from dtrain.tuning._nf4 import Rounded

ALL_LINEAR = "all-linear"
_NAME = "default"
_BASE = "base_layer"
FROM_VALUES = ("pissa", "olora")
"""Starts that take what the layer's own weights have most of out of them, and train that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
    make: Callable[[list[str]], PeftConfig]
    """Peft's configuration for layers of these names."""
    targets: Sequence[str]
    """Patterns of the linear layers that something is added to."""
    also: Sequence[str] = ()
    """Modules that are trained whole."""
    of_base: bool = False
    """Whether what is added starts from the values of the layer it is added to."""
    changes_base: bool = False
    """Whether it takes away there what it starts from."""
    init_from: str = ""
    """A folder with an adapter to start from instead."""


def add(bundle: ModelBundle, what: Addition, *, seed: int) -> ModelBundle:
    """Add layers to linear ones, and train them alone. Raises ModelError."""
    from peft import inject_adapter_in_model

    module = bundle.module
    found = _targets(bundle, what.targets)
    whole = _modules(module, [*what.also, *([bundle.outputs] if bundle.outputs else [])])
    module.requires_grad_(False)  # noqa: FBT003
    names = [name for name, _ in module.named_parameters()]
    config = what.make(found)
    # The rules for the start need values, which there are none of on meta.
    inject_adapter_in_model(_without_start(config), module)
    _settle(module)
    targets = frozenset(found)
    trained: dict[str, tuple[int, ...]] = {}
    for name, param in module.named_parameters():
        is_added = _layer_of(name, targets) is not None and f".{_BASE}." not in name
        if is_added or any(name.startswith(f"{one}.") for one in whole):
            trained[name] = tuple(param.shape)
        param.requires_grad_(name in trained)
    start = _Start(Path(what.init_from), config, trained) if what.init_from else None
    if start is not None:
        ids = {id(module.get_parameter(name)): shape for name, shape in trained.items()}
        start.check({_peft_name(name): ids[id(param)] for name, param in module.named_parameters(remove_duplicate=False)
                     if id(param) in ids})  # fmt: skip
    weights = _Weights(bundle.weights, _Maker(module, what.make, targets, seed), what, start)
    said = _plain(what.make, found, names, whole)
    if bundle.outputs is not None:
        said["task_type"] = "SEQ_CLS"
    if bundle.head is bundle.embedding and bundle.head is not None and bundle.head.requires_grad:
        said["ensure_weight_tying"] = True  # else peft would put back the old head beside the new embedding
    adapter = _Adapter(module, weights, said, pure=not whole, changes_base=what.changes_base)
    of_model = bundle.export_name

    def export_name(name: str) -> str:
        return _peft_name(name) if name in trained else of_model(plain(name))

    return dataclasses.replace(bundle, weights=weights, adapter=adapter, export_name=export_name)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """A model of transformers with the adapter that peft has written into `folder`. Raises ModelError."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():  # of names that peft asks transformers for, and nothing here
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(cast(Any, model), folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: peft does not load it onto this model: {error}") from error


def plain(name: str) -> str:
    """The name of a parameter of the model before anything was added."""
    return name.replace(f".{_BASE}.", ".")


def _peft_name(name: str) -> str:
    """As a file of peft has it."""
    name = "base_model.model." + name.replace(f".{_NAME}", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def linear_layers(bundle: ModelBundle) -> list[tuple[str, nn.Linear]]:
    """Of all blocks, in the module's order."""
    inside = {id(module) for block in bundle.blocks for module in block.modules()}
    return [(name, module) for name, module in bundle.module.named_modules()
            if isinstance(module, nn.Linear) and id(module) in inside]  # fmt: skip


def put_in(bundle: ModelBundle, rounded: Rounded, *, nested: bool) -> None:
    """Put 4-bit layers in place of the linear ones of all blocks, but for what was added to them."""
    from dtrain.tuning._nf4 import NF4Linear

    for name, layer in linear_layers(bundle):
        weight = f"{plain(f'{name}.weight')}"
        if weight in rounded.shapes:
            holder, _, last = name.rpartition(".")
            setattr(
                bundle.module.get_submodule(holder),
                last,
                NF4Linear.of(rounded.whole(weight), layer.bias, nested=nested),
            )


def _targets(bundle: ModelBundle, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that are meant, in the module's order. Raises ModelError."""
    linear = [name for name, _ in linear_layers(bundle)]
    chosen: set[str] = set()
    wrong = []
    for target in targets:
        here = linear if target == ALL_LINEAR else [
            name for name in linear if fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")
        ]  # fmt: skip
        chosen.update(here)
        if not here:
            wrong.append(f"tuning.targets={target}: matches no linear layer of the model; {near(target, linear)}")
    if wrong:
        raise ModelError("\n".join(wrong))
    return [name for name in linear if name in chosen]


def _modules(module: nn.Module, names: Sequence[str]) -> list[str]:
    found, wrong = [], []
    there = [name for name, one in module.named_modules() if name and any(True for _ in one.parameters())]
    for name in names:
        here = [one for one in there if one == name or one.endswith(f".{name}")]
        found += [one for one in here if one not in found]
        if not here:
            wrong.append(f"tuning.modules_to_save={name}: no module of the model; {near(name, there)}")
    if wrong:
        raise ModelError("\n".join(wrong))
    return found


def _layer_of(name: str, targets: frozenset[str]) -> str | None:
    """The layer that this parameter belongs to, of those that something was added to."""
    parts = name.split(".")
    return next((layer for i in range(len(parts) - 1, 0, -1) if (layer := ".".join(parts[:i])) in targets), None)


def _settle(module: nn.Module) -> None:
    """Numbers that never change are no parameters: peft keeps the rank of AdaLoRA's layers as one, and in no file."""
    for layer in (cast(Any, one) for one in module.modules()):
        ranks = getattr(layer, "ranknum", None)
        if isinstance(ranks, nn.ParameterDict):
            del layer.ranknum
            layer.ranknum = {name: float(layer.r[name]) for name in ranks}


def _without_start(config: PeftConfig) -> PeftConfig:
    """The same without a start that is worked out from the values of the layers."""
    config = copy.deepcopy(config)
    if str(getattr(config, "init_lora_weights", "")).startswith(FROM_VALUES):
        config.init_lora_weights = True  # type: ignore[attr-defined]
    return config


def _plain(make: Callable[[list[str]], PeftConfig], found: Sequence[str], names: Sequence[str],
           whole: Sequence[str]) -> dict[str, Any]:  # fmt: skip
    """What stands in `adapter_config.json`. Layers are named by their last part where that means the same ones."""
    leaves = sorted({name.rpartition(".")[2] for name in found})
    owners = {name.rpartition(".")[0] for name in names}
    short = {name for name in owners if name.rpartition(".")[2] in leaves} == set(found)
    config = make(leaves if short else list(found))
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if isinstance(said.get("init_lora_weights"), str):
        said["init_lora_weights"] = True  # the start has been made; peft would make it again, on the model it loads
    return said | {"inference_mode": True, "modules_to_save": list(whole) or None}


@final
class _Maker:
    """One layer with what peft adds to it, on the CPU in fp32."""

    def __init__(self, module: nn.Module, make: Callable[[list[str]], PeftConfig], targets: frozenset[str],
                 seed: int) -> None:  # fmt: skip
        self.targets = targets
        # Copies, on meta as the module still is: strategies put other parameters in its place.
        self.bare = {name: copy.deepcopy(module.get_submodule(name).get_submodule(_BASE)) for name in targets}
        self._make, self._seed = make, seed

    def __call__(self, layer: str, base: Callable[[str], torch.Tensor] | None) -> nn.Module:
        """`base`: gives the values of the layer itself, by the names of its own parameters; None where they do not
        matter.
        """
        from peft import inject_adapter_in_model

        bare = copy.deepcopy(self.bare[layer]).to_empty(device="cpu").float().requires_grad_(False)  # noqa: FBT003
        if base is not None:
            for name, param in bare.named_parameters():
                param.data.copy_(base(name).view(param.shape))
        root = holder = nn.Module()
        *outer, last = layer.split(".")
        for part in outer:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(last, bare)
        config = self._make([layer])
        with seeded(self._seed, layer), torch.no_grad():
            inject_adapter_in_model(config if base is not None else _without_start(config), root)
        _settle(root)
        return root.get_submodule(layer)


@final
class _Start:
    """An adapter's folder to start from."""

    def __init__(self, folder: Path, config: PeftConfig, names: Collection[str]) -> None:
        """`names`: of the parameters that it is to have values of."""
        from safetensors import safe_open

        try:
            said = json.loads((folder / ADAPTER_CONFIG).read_text())
            self._file = safe_open(folder / ADAPTER_WEIGHTS, framework="pt").__enter__()
        except (OSError, ValueError) as error:
            raise ModelError(f"tuning.init_from={folder}: no adapter that peft has written ({error})") from None
        self.folder, self.names = folder, names
        keys = ("peft_type", "r", "init_r", "lora_alpha", "use_rslora", "use_dora")
        mine = json.loads(json.dumps(config.to_dict(), default=sorted))  # as a file says it
        self._wrong = [f"{key}: {said.get(key)} there, {mine.get(key)} here" for key in keys
                       if key in mine and said.get(key) != mine.get(key)]  # fmt: skip

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ModelError with all that differs."""
        there = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        wrong = [*self._wrong]
        wrong += [f"{name}: {there.get(name, 'not there')}, {shape} here" for name, shape in shapes.items()
                  if there.get(name) != shape]  # fmt: skip
        wrong += [f"{name}: there, and nothing is added so here" for name in there if name not in shapes]
        if wrong:
            more = f"\n  and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            raise ModelError(
                f"tuning.init_from={self.folder}: another kind of adapter:\n  " + "\n  ".join(wrong[:6]) + more
            )

    def read(self, name: str) -> torch.Tensor:
        return torch.as_tensor(self._file.get_tensor(_peft_name(name)))


@final
class _Weights(AbstractWeights):
    """Of the model and of what was added to it."""

    def __init__(self, base: AbstractWeights, maker: _Maker, what: Addition, start: _Start | None) -> None:
        self.base, self.maker, self.start = base, maker, start
        self._of_base, self._changes_base = what.of_base, what.changes_base
        self._kept: collections.OrderedDict[str, dict[str, torch.Tensor]] = collections.OrderedDict()

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        if self.start is not None and name in self.start.names:
            return self.start.read(name).reshape(-1)[start : start + numel]
        layer = _layer_of(name, self.maker.targets)
        if layer is None or (f".{_BASE}." in name and not self._changes_base):
            return self.base.read(plain(name), start, numel)
        return self._values(layer)[name[len(layer) + 1 :]].reshape(-1)[start : start + numel]

    def _values(self, layer: str) -> dict[str, torch.Tensor]:
        if layer not in self._kept:
            if len(self._kept) > 1:
                self._kept.popitem(last=False)
            shapes = {key: param.numel() for key, param in self.maker.bare[layer].named_parameters()}

            def value(key: str) -> torch.Tensor:
                return self.base.read(f"{layer}.{key}", 0, shapes[key])

            made = self.maker(layer, value if self._of_base else None)
            self._kept[layer] = {key: param.detach() for key, param in made.named_parameters()}
        self._kept.move_to_end(layer)
        return self._kept[layer]


@final
class _Adapter(AbstractAdapter):
    def __init__(self, module: nn.Module, weights: _Weights, config: Mapping[str, Any], *, pure: bool,
                 changes_base: bool) -> None:  # fmt: skip
        self.config = dict(config)
        self.pure = pure and not changes_base
        self._module, self._weights, self._maker, self._changes_base = module, weights, weights.maker, changes_base
        # Of the module as it is on meta: strategies put other parameters in their place.
        self._shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        self._trained = {name: self._shapes[name] for name, param in module.named_parameters() if param.requires_grad}
        first = {id(param): name for name, param in module.named_parameters() if param.requires_grad}
        self._tied = {name: first[id(param)] for name, param in module.named_parameters(remove_duplicate=False)
                      if id(param) in first and first[id(param)] != name}  # fmt: skip
        if changes_base:
            # What training has made of the part that was taken out, less that part itself: twice the rank.
            rank = self.config["r"]
            self.config |= {"r": 2 * rank, "lora_alpha": self.config["lora_alpha"] * (
                math.sqrt(2) if self.config["use_rslora"] else 2)}  # fmt: skip

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        assert self.pure, "parts of the model itself are trained"
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self._module.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            # Not by its method, which changes what is trained: strategies have settled that.
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        own = {_peft_name(name): self._doubled(name, shape) for name, shape in self._trained.items()}
        # Peft asks for what is tied under each of its names.
        return own | {_peft_name(name): self._trained[kept] for name, kept in self._tied.items()}

    def _doubled(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self._changes_base or _layer_of(name, self._maker.targets) is None:
            return shape
        return (2 * shape[0], shape[1]) if ".lora_A." in name else (shape[0], 2 * shape[1])

    def tensors(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in self._trained.items():
            now = learned(name).view(shape)
            if self._changes_base and _layer_of(name, self._maker.targets) is not None:
                first = self._weights.read(name, 0, now.numel()).view(shape)
                now = torch.cat([now, first]) if ".lora_A." in name else torch.cat([now, -first], dim=1)
            yield _peft_name(name), now
        for name, kept in self._tied.items():
            yield _peft_name(name), learned(kept).view(self._trained[kept])

    def merged_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {plain(name): shape for name, shape in self._shapes.items()
                if f".{_BASE}." in name or _layer_of(name, self._maker.targets) is None}  # fmt: skip

    def merged(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        def value(name: str) -> torch.Tensor:
            if name in self._trained:
                return learned(name)
            return self._weights.read(name, 0, math.prod(self._shapes[name])).float()

        done: set[str] = set()
        for name, shape in self._shapes.items():
            layer = _layer_of(name, self._maker.targets)
            if layer is None:
                yield name, value(name).view(shape)
            elif layer not in done:
                done.add(layer)
                made = self._maker(layer, None)
                with torch.no_grad():
                    for key, one in made.named_parameters():
                        one.copy_(value(f"{layer}.{key}").view(one.shape))
                    cast(Any, made).merge(safe_merge=True)
                for key, one in made.get_submodule(_BASE).named_parameters():
                    yield f"{layer}.{key}", one.detach()
