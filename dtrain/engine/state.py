"""Where a run is: what a failure names, and what a checkpoint keeps of the loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from dtrain.errors import CheckpointError
from dtrain.failpoints import reach

_Count = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(slots=True)
class Progress:
    """Mutable on purpose: the worker reads it when something breaks, and the launcher hears of each change."""

    phase: str = "init"
    """init, load, begin, data, train, eval, save, write (waiting for a save to be written), export, end."""
    step: int = 0
    """Optimizer steps done."""
    rows: Sequence[int] = ()
    """Of the prepared data, in the micro-batch that is computed."""
    pulse: Callable[[str, int, Sequence[int]], None] = lambda phase, step, rows: None
    """Hears of it."""

    def at(self, phase: str, step: int | None = None, rows: Sequence[int] = ()) -> None:
        """Say where this rank is; also where it is still there but has got on. `step` stays where it is not given."""
        self.phase, self.rows = phase, rows
        if step is not None:
            self.step = step
        self.pulse(phase, self.step, rows)
        reach(f"at.{phase}")


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What training has come to, but for tensors. The same on every rank."""

    step: _Count = 0
    """Optimizer steps done."""
    samples: _Count = 0
    """Rows consumed; the place in the endless order of rows, whatever the global batch was."""
    tokens: _Count = 0
    targets: _Count = 0
    first_loss: float | None = None
    last_loss: float | None = None
    recent: tuple[float, ...] = ()
    """Losses of the last steps, where a leap is looked for."""
    left_out: tuple[int, ...] = ()
    """Steps whose rows were not learned from."""
    eval_step: int | None = None
    """When the held-out rows were last looked at, and the loss on them."""
    eval_loss: float | None = None
    sample_step: int | None = None
    """When the prompts were last answered."""
    consumed: Mapping[str, Mapping[str, int]] | None = None
    """Samples and tokens of each source of the data at the last save; to be read, as `samples` alone says the place."""
    stream: Mapping[str, Any] | None = None
    """Of streamed data, what all ranks know of it; where each shard was, the ranks' own files of a checkpoint say."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> State:
        """What a checkpoint kept; what later versions have kept besides is left out. Raises CheckpointError."""
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        if missing := {"step", "samples"} - known.keys():
            raise CheckpointError(f"its progress lacks {' and '.join(sorted(missing))}: where it was is not known")
        try:
            return _adapter().validate_python(known)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise CheckpointError(f"its progress.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@functools.cache
def _adapter() -> TypeAdapter[State]:
    return TypeAdapter(State)
