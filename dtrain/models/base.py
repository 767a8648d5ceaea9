"""What a model is to the engine: a module without weights, and where the weights come from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn


class AbstractWeights(ABC):
    """Full fp32 values of parameters, one at a time, so that no rank ever holds a whole model."""

    @abstractmethod
    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened parameter `name`; a 1-D CPU tensor in the stored dtype.

        The same on every rank and for every split. Reads no more of the file than it has to.
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
    base: Callable[[], AbstractContextManager[None]] | None = None
    """Inside it the module computes what it did before tuning; None where tuning changes its own weights."""
