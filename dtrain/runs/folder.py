"""Where a run keeps what."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dtrain.runs import lock as _lock
from dtrain.runs.failures import Failure, first_failure, read_failures
from dtrain.runs.files import append_json, read_json, write_json
from dtrain.runs.outcomes import Outcome
from dtrain.runs.secrets import scrub


def utc() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


class RunDir:
    """A run folder by its path. Making the object touches nothing on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  a symlink stays one: its name is what the user knows
        self.config = self.path / "config.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evals = self.path / "eval.jsonl"
        self.events = self.path / "events.jsonl"
        self.outcome = self.path / "outcome.json"
        self.export = self.path / "export"
        self.exports = self.path / "exports"
        """What `dtrain export` makes of its checkpoints."""
        self.checkpoints = self.path / "checkpoints"
        self.save_trigger = self.path / "SAVE"
        """Made by whoever wants a save now; the run removes it."""
        self.stop_trigger = self.path / "STOP"
        """Made by whoever wants it to save and stop, such as a batch script; the run removes it."""
        self.requeue = self.path / "REQUEUE"
        """Made for a batch script: the job is to be queued again. Holds the name of the job's start that is meant."""
        self.nodes = self.path / ".nodes"
        """Where the machines of a run find each other."""
        self.joined = self.nodes / "JOINED"
        """Made by the machine that leads when another has come: the run saves and all meet anew; the run removes it."""
        self.model = self.path / "model"
        """Config and tokenizer of the model, for exports."""

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    def attempt_dir(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.attempt_dir(attempt) / f"rank-{rank}.log"

    def launcher_log(self, attempt: int, node: int = 0) -> Path:
        return self.attempt_dir(attempt) / (f"launcher-{node}.log" if node else "launcher.log")

    def hang_dir(self, attempt: int) -> Path:
        """Stacks of an attempt that did not get on."""
        return self.path / "hang" / f"attempt-{attempt}"

    def lock(self, note: Callable[[str], None] = lambda line: None) -> AbstractContextManager[_lock.Holder]:
        """Make the folder and be its only writer. Raises RunError; `note` hears of a lock that a dead process left."""
        _lock.check(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        return _lock.hold(self.path, note)

    def beat(self) -> None:
        _lock.beat(self.path)

    def beating(self) -> AbstractContextManager[None]:
        """Beat while the block is busy. To be called by the holder."""
        return _lock.beating(self.path)

    def holder(self) -> _lock.Holder | None:
        """Who is running it now."""
        return _lock.live_holder(self.path / _lock.NAME)

    def attempts(self) -> list[int]:
        """Numbers of the attempts made so far."""
        numbers = (path.name.removeprefix("attempt-") for path in (self.path / "logs").glob("attempt-*"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def new_attempt(self) -> int:
        """Make the log folder of the next attempt: 0, 1, 2, ..."""
        attempt = max(self.attempts(), default=-1) + 1
        while True:
            try:
                self.attempt_dir(attempt).mkdir(parents=True)
            except FileExistsError:
                attempt += 1
            else:
                return attempt

    def read_manifest(self) -> dict[str, Any]:
        """What the manifest says; empty where there is none."""
        return read_json(self.manifest) or {}

    def write_manifest(self, fields: Mapping[str, Any]) -> None:
        """Replace all but the list of attempts. Only the holder of the lock writes the manifest."""
        attempts = self.read_manifest().get("attempts", [])
        write_json(self.manifest, scrub({"attempts": attempts, **fields}))

    def update_manifest(self, **fields: Any) -> None:
        """Set some fields and keep the others."""
        self.write_manifest({**self.read_manifest(), **fields})

    def add_attempt(self, attempt: int, **fields: Any) -> None:
        """Set fields of one attempt in the manifest's list; `started` is set when it is first seen."""
        attempts = [dict(entry) for entry in self.read_manifest().get("attempts", [])]
        entry = next((entry for entry in attempts if entry.get("attempt") == attempt), None)
        if entry is None:
            entry = {"attempt": attempt, "started": utc()}
            attempts.append(entry)
        entry.update(fields)
        self.update_manifest(attempts=attempts)

    def event(self, kind: str, **fields: Any) -> None:
        """Add one line to events.jsonl; any process may. A disk that refuses it is told on stderr, and ends no run."""
        line = {"time": utc(), "monotonic": time.monotonic(), "kind": kind, **scrub(fields)}
        try:
            append_json(self.events, line)
        except OSError as error:
            with contextlib.suppress(OSError):  # stderr may be a log on the same disk
                sys.stderr.write(f"{self.events}: {error.strerror}; event lost: {kind}\n")

    def failures(self, attempt: int) -> list[Failure]:
        return read_failures(self, attempt)

    def first_failure(self, attempt: int) -> Failure | None:
        return first_failure(self.failures(attempt))

    def write_outcome(self, kind: str, attempt: int, *, step: int | None = None, message: str = "", reason: str = "",
                      failure: Failure | None = None) -> Outcome:  # fmt: skip
        """Say how the attempt ended: `done` and `stopped` by rank 0, anything else by the launcher."""
        outcome = Outcome(kind=kind, attempt=attempt, step=step, message=message, reason=reason, time=utc(),
                          failure=failure)  # fmt: skip
        write_json(self.outcome, scrub(outcome.as_dict()))
        return outcome

    def read_outcome(self, attempt: int | None = None) -> Outcome | None:
        """How the last attempt ended, or None; with `attempt`, None too where the file speaks of another one."""
        fields = read_json(self.outcome)
        if not fields or (attempt is not None and fields.get("attempt") != attempt):
            return None
        return Outcome.from_dict(fields)
