"""Where a run is: what a failure names, and what a checkpoint keeps of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(slots=True)
class Progress:
    """Mutable on purpose: the worker reads it when something breaks."""

    phase: str = "start"
    """start, join, load, train, eval, save, export."""
    step: int = 0
    """Optimizer steps done."""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What training has come to, but for tensors. The same on every rank."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Rows consumed; the place in the endless order of rows, whatever the global batch was."""
    tokens: int = 0
    targets: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_step: int | None = None
    """When the held-out rows were last looked at, and the loss on them."""
    eval_loss: float | None = None
    consumed: Mapping[str, Mapping[str, int]] | None = None
    """Samples and tokens of each source of the data at the last save; to be read, as `samples` alone says the place."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> State:
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields})
