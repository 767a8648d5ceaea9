"""What a tracker is told. Only rank 0 has trackers."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dtrain.trackers._words import duration

_PROMPT, _TEXT = 60, 200
"""The most characters of a sample that people are shown."""


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


class Sample(NamedTuple):
    prompt: str
    """As the model was given it."""
    text: str
    finish: str
    """stop, or length where it came to no end."""
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class SamplesReport:
    """What the model goes on with after each of `eval.prompts`."""

    step: int
    samples: Sequence[Sample]
    sample_s: float

    def lines(self) -> list[str]:
        """For people: of each the end of the prompt and the beginning of the text, as JSON on a line of its own, so
        that nothing in them moves a cursor.
        """
        found = [f"samples at step {self.step}  ({duration(self.sample_s)})"]
        for one in self.samples:
            prompt = one.prompt if len(one.prompt) <= _PROMPT else f"...{one.prompt[3 - _PROMPT :]}"
            text = one.text if len(one.text) <= _TEXT else f"{one.text[: _TEXT - 3]}..."
            found.append(f"  {_quoted(prompt)} -> {_quoted(text)}")
        return found


def _quoted(text: str) -> str:
    """With all escaped that is not to be printed."""
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in plain)


class AbstractTracker(ABC):
    """A tracker never fails a run: what goes wrong in it is its own warning, once."""

    @abstractmethod
    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        """`lines` say in words what runs: model, strategy, batch, precision."""

    @abstractmethod
    def step(self, report: StepReport) -> None: ...

    @abstractmethod
    def eval(self, report: EvalReport) -> None: ...

    def samples(self, report: SamplesReport) -> None:
        """As notes, unless the tracker has a better place for texts."""
        for line in report.lines():
            self.note(line)

    @abstractmethod
    def note(self, line: str) -> None:
        """Something that the user should know, in a sentence."""

    @abstractmethod
    def finish(self, *, outcome: str) -> None:
        """`outcome`: done, failed or stopped. Flushes and closes."""

    def warnings(self) -> list[str]:
        """What went wrong in this tracker since the last call, for the others to show."""
        return []
