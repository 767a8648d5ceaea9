"""What a model is to the engine: a module without weights, where the weights come from, and how it attends."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dtrain.comm import AbstractComm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that precisions have in configurations."""


class AbstractWeights(ABC):
    """Full fp32 values of parameters, one at a time, so that no rank ever holds a whole model."""

    @abstractmethod
    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter `name`; a 1-D CPU tensor in the stored dtype.

        The same on every rank and for every split. Reads no more of the file than it has to.
        """


class AbstractAdapter(ABC):
    """What a tuning has added to a model that is itself left as it is."""

    config: Mapping[str, Any]
    """Of `adapter_config.json`, but for where the model is."""
    pure: bool
    """Whether the model itself is left as it is: nothing of it is trained beside what was added."""
    apart: str | None = None
    """Why it cannot be worked into the model; None where it can."""

    @abstractmethod
    def switched_off(self) -> AbstractContextManager[None]:
        """The model gives what it gave before anything was added. Only where it is `pure`."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of what a file with this adapter alone holds, by its names there."""

    @abstractmethod
    def tensors(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same in fp32, in the same order. `learned`: a trained parameter, whole, by its name in the module."""

    @abstractmethod
    def merged_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter of the model, by its name in an exported folder, in its order."""

    @abstractmethod
    def merged(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the model with what was learned worked into it, in fp32, one at a time, named as
        `merged_shapes`. `learned`: as for `tensors`.
        """


class Part(Protocol):
    """What a rank owns of a parameter that is trained, as `strategies.base.Shard` tells."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def views(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def replica(self) -> int: ...


class AbstractAlongside(ABC):
    """What a tuning does while it is trained, besides its gradients."""

    state_names: Sequence[str]
    """What it keeps of every number that is trained, beside the optimizer's own state."""

    @abstractmethod
    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimizer keep `state_names` in its state, from pieces of parameters as from whole ones."""

    @abstractmethod
    def begin(self, step: int, steps: int) -> None:
        """Optimizer step `step`, counted from 1, of `steps` begins."""

    @abstractmethod
    def term(self) -> tuple[str, torch.Tensor] | None:
        """After a forward: what is added to the mean loss of the whole step, and its name."""

    @abstractmethod
    def after(self, step: int, steps: int, parts: Callable[[], Iterable[Part]], comm: AbstractComm) -> bool:
        """After the update of a step. `parts`: what this rank owns, as live views. True where weights were changed, on
        all ranks. Collective.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Where and how a model will run."""

    device: torch.device
    dtype: torch.dtype
    """Of forward and backward."""
    packed: bool
    """Whether a row may hold several documents."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """What computes attention, and why it does."""

    name: str
    why: str
    passed_over: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What would have been taken before it, each with its reason."""

    @property
    def line(self) -> str:
        reasons = list(dict.fromkeys(self.passed_over.values()))
        over = [f"{', '.join(name for name, one in self.passed_over.items() if one == why)}: {why}" for why in reasons]
        return "; ".join([f"attention by {self.name}, {self.why}", *over])


@dataclasses.dataclass(frozen=True, slots=True)
class LossKernel:
    """What computes the loss of a training, and why it does."""

    name: str
    why: str

    @property
    def line(self) -> str:
        return f"loss by {self.name}, {self.why}"


def _its_own(setting: Setting, comm: AbstractComm) -> Attention:
    return Attention("the model", "which has nothing to choose")


def _its_own_loss(setting: Setting, comm: AbstractComm) -> LossKernel:
    return LossKernel("the model", "which has nothing to choose")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelBundle:
    module: nn.Module
    """Parameters on meta; buffers real, on the CPU. `module(**batch.inputs)` gives what the objective expects."""
    blocks: Sequence[nn.Module]
    """The repeated layers, in order: the unit of sharding and of activation checkpointing."""
    weights: AbstractWeights
    """By the names of `module.named_parameters()`."""
    export_name: Callable[[str], str]
    """The name of a parameter in the exported folder."""
    assets: Path
    """Config and tokenizer files that an export copies."""
    embedding: nn.Parameter | None = None
    """Of tokens, (vocabulary, hidden); None for a model that has none."""
    head: nn.Parameter | None = None
    """The projection to the vocabulary, (vocabulary, hidden): the embedding itself where the model ties them."""
    outputs: str | None = None
    """The module with outputs of its own in place of the vocabulary, which every tuning trains whole."""
    adapter: AbstractAdapter | None = None
    """None where nothing was added; else an export is of what was added alone, and `export_name` names it in there."""
    alongside: AbstractAlongside | None = None
    """None where gradients are all that changes what is trained."""
    choose_attention: Callable[[Setting, AbstractComm], Attention] = _its_own
    """Settle what computes attention in the module, the same on all ranks, before anything else is done to it. Raises
    ModelError. Collective.
    """
    choose_loss: Callable[[Setting, AbstractComm], LossKernel] = _its_own_loss
    """The same of what computes the loss."""
