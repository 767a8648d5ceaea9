"""The runs of a folder, at a glance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dtrain.runs.files import last_json
from dtrain.runs.folder import RunDir
from dtrain.runs.outcomes import BY_SCHEDULER

State = Literal["queued", "running", "resumed", "done", "failed", "stopped", "preempted", "died", "new"]


@dataclasses.dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of `dtrain runs`; None where the run does not say."""

    name: str
    path: Path
    state: State
    """`queued`: a scheduler has it. `resumed`: running, not for the first time. `preempted`: stopped because its time
    was over or the scheduler said so. `died`: started, held by nobody, and without an outcome. `new`: never started.
    """
    step: int | None
    steps: int | None
    loss: float | None
    eval_loss: float | None
    """Of the last eval."""
    started: str | None
    strategy: str | None
    size: int | None
    attempts: int


def list_runs(root: Path) -> list[RunSummary]:
    """Every run folder under `root`, newest first. Reads the manifest (`started`, `steps`, `strategy`, `size`), the
    outcome, the lock and the end of the metrics.
    """
    if not root.is_dir():
        return []
    found = {path.parent for pattern in ("*/manifest.json", "*/config.yaml") for path in root.glob(pattern)}
    summaries = [summary(RunDir(path)) for path in found if not path.name.startswith(".")]
    return sorted(summaries, key=lambda run: (run.started or "", run.name), reverse=True)


def summary(run: RunDir) -> RunSummary:
    manifest = run.read_manifest()
    attempts = run.attempts()
    last = last_json(run.metrics) or {}
    begun: list[dict[str, Any]] = manifest.get("attempts") or [{}]
    return RunSummary(
        name=run.name,
        path=run.path,
        state=_state(run, attempts),
        step=last.get("step"),
        steps=manifest.get("steps"),
        loss=last.get("loss"),
        eval_loss=(last_json(run.evals) or {}).get("loss"),
        started=manifest.get("started") or begun[0].get("started"),
        strategy=manifest.get("strategy"),
        size=manifest.get("size"),
        attempts=len(attempts),
    )


def _state(run: RunDir, attempts: list[int]) -> State:
    if run.holder() is not None:
        return "resumed" if len(attempts) > 1 else "running"
    if (last_json(run.events) or {}).get("kind") == "submitted":
        return "queued"
    outcome = run.read_outcome(attempts[-1]) if attempts else None
    if outcome is None:
        return "died" if attempts else "new"
    return "preempted" if outcome.kind == "stopped" and outcome.reason in BY_SCHEDULER else outcome.state


RUNNING = ("running", "resumed")
