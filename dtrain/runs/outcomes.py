"""How an attempt ended."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dtrain.runs.failures import Failure

TIME_LIMIT, STOP_FILE = "the time limit is near", "the file STOP"
JOINED, LEFT = "another machine has come", "a machine has left"
"""Reasons for which a run that may do with fewer and more machines goes on: all meet anew."""
BY_SCHEDULER = (TIME_LIMIT, STOP_FILE, "SIGUSR1")
"""Reasons that come from a job's time being over rather than from a person who wants an end."""
STOPPED = 75
"""The exit code of a run that was stopped on purpose and saved."""
EXIT_CODES = {"done": 0, "user": 2, "stopped": STOPPED}
"""Of `dtrain launch`; every other kind is 3."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What `outcome.json` says. The exit code of a launcher means nothing; this does."""

    kind: str
    """done, stopped, or why it failed: user, worker, hang, nonfinite, leap, oom, storage, lost, launcher."""
    attempt: int
    step: int | None = None
    """The last step that counts; None where it is not known."""
    message: str = ""
    reason: str = ""
    """What stopped it: the name of a signal, or as `engine/control.py` words it."""
    time: str = ""
    failure: Failure | None = None

    @property
    def state(self) -> Literal["done", "stopped", "failed"]:
        return "done" if self.kind == "done" else "stopped" if self.kind == "stopped" else "failed"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.kind, 3)

    def as_dict(self) -> dict[str, Any]:
        return {"state": self.state, "exit_code": self.exit_code, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Outcome:
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in fields.items() if name in names}
        failure = known.get("failure")
        return cls(**{**known, "failure": Failure.from_dict(failure) if failure else None})
