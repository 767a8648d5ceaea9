"""The last steps of a run, and those to come."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path

    from dtrain.runs import RunDir

LOOK_S = 0.5


def tail(run: RunDir, num: int, *, follow: bool) -> int:
    """Print them; with `follow` until the run ends, in which case the exit code is the run's."""
    from dtrain.runs.files import read_lines
    from dtrain.runs.listing import RUNNING, summary

    if num < 0:
        raise RunError(f"--lines={num}: not a number of steps")
    now = summary(run)
    rows = list(read_lines(run.metrics))
    if not rows and not follow:
        raise RunError(f"{run.path}: no steps in metrics.jsonl; it is {now.state}, or has no tracker=jsonl")
    for row in rows[len(rows) - min(num, len(rows)) :]:
        print(_line(row, now.steps))
    if not follow:
        return 0
    steps, events = _Growing(run.metrics), _Growing(run.events)
    while True:
        over = (state := summary(run).state) not in (*RUNNING, "queued")
        for event in events.more():
            print(_event(event), flush=True)
        for row in steps.more():
            print(_line(row, now.steps), flush=True)
        if over:
            break
        time.sleep(LOOK_S)
    outcome = run.read_outcome()
    print(state if outcome is None else f"{outcome.kind}: {outcome.message}", flush=True)
    return 3 if outcome is None else outcome.exit_code


class _Growing:
    """A file of JSON lines, from its present end on. One that an attempt rewrites is read on from its new end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def more(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            self._at = min(self._at, self._path.stat().st_size)
            file.seek(self._at)
            whole, _, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + 1 if whole else 0
        return [value for line in whole.splitlines() if isinstance(value := json.loads(line), dict)]


def _line(row: Mapping[str, Any], steps: int | None) -> str:
    from dtrain.trackers.base import StepReport
    from dtrain.trackers.console import figures

    names = [field.name for field in dataclasses.fields(StepReport) if field.name != "extras"]
    said: dict[str, Any] = {name: row.get(name) for name in names}
    for name in ("loss", "grad_norm", "lr"):
        said[name] = math.nan if said[name] is None else said[name]
    return f"step {row['step']:>{len(str(steps or ''))}}/{steps or '?'}  {figures(StepReport(**said))}"


def _event(event: Mapping[str, Any]) -> str:
    words = [f"{key} {value}" for key, value in event.items()
             if key not in ("time", "monotonic", "kind") and isinstance(value, str | int)]  # fmt: skip
    return f"{event.get('kind')}: {', '.join(words)}"
