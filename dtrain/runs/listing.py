"""The runs of a folder, at a glance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dtrain.runs.files import last_json
from dtrain.runs.folder import RunDir

State = Literal["running", "done", "failed", "stopped", "died", "new"]


@dataclasses.dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of `dtrain runs`; None where the run does not say."""

    name: str
    path: Path
    state: State
    """`died`: it was started, nobody holds it, and it left no outcome. `new`: never started."""
    step: int | None
    steps: int | None
    loss: float | None
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
        started=manifest.get("started") or begun[0].get("started"),
        strategy=manifest.get("strategy"),
        size=manifest.get("size"),
        attempts=len(attempts),
    )


def _state(run: RunDir, attempts: list[int]) -> State:
    if run.holder() is not None:
        return "running"
    outcome = run.read_outcome(attempts[-1]) if attempts else None
    if outcome is not None:
        return outcome.state
    return "died" if attempts else "new"
