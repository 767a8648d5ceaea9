"""What a model is to the engine: a module without weights, and where the weights come from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn


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

    @abstractmethod
    def switched_off(self) -> AbstractContextManager[None]:
        """The model gives what it gave before anything was added. Only where it is `pure`."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of what a file with this adapter alone holds, by its names there."""

    @abstractmethod
    def tensors(self, value: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same in fp32, in the same order. `value`: as for `merged`."""

    @abstractmethod
    def merged_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter of the model, by its name in an exported folder, in its order."""

    @abstractmethod
    def merged(self, value: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the model with what was learned worked into it, in fp32, one at a time, named as
        `merged_shapes`. `value`: of a parameter of the module with its additions, whole, by its name.
        """


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
    adapter: AbstractAdapter | None = None
    """None where nothing was added; else an export is of what was added alone, and `export_name` names it in there."""
