"""What a tracker is told. Only rank 0 has trackers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, over all ranks."""

    step: int
    """From 1."""
    loss: float
    """Mean over the targets of the global batch, in nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    num_targets: int
    tokens: int
    """Without padding."""
    tokens_per_s: float
    step_s: float
    data_s: float
    """Of step_s: waiting for rows."""
    mfu: float | None
    """Model FLOPs without recomputation over the device's dense peak; None where no peak is known."""
    mem_bytes: int
    """Peak on the fullest rank: of the device's allocator, or resident memory on CPU."""
    epoch: float
    samples: int
    """Consumed so far."""
    extras: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Confusion(NamedTuple):
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    """Row by row: how many that have a label were given each of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class EvalReport:
    step: int
    loss: float
    num_targets: int
    eval_s: float
    extras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    confusion: Confusion | None = None
    """Of labels, where texts are classified."""


class AbstractTracker(ABC):
    """A tracker never fails a run: what goes wrong in it is its own warning, once."""

    @abstractmethod
    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        """`lines` say in words what runs: model, strategy, batch, precision."""

    @abstractmethod
    def step(self, report: StepReport) -> None: ...

    @abstractmethod
    def eval(self, report: EvalReport) -> None: ...

    @abstractmethod
    def note(self, line: str) -> None:
        """Something that the user should know, in a sentence."""

    @abstractmethod
    def finish(self, *, outcome: str) -> None:
        """`outcome`: done, failed or stopped. Flushes and closes."""

    def warnings(self) -> list[str]:
        """What went wrong in this tracker since the last call, for the others to show."""
        return []
