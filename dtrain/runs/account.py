"""What the wall time of a run went into, and how much is left."""

from __future__ import annotations

import calendar
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.runs.files import read_lines
from dtrain.runs.folder import RunDir

_LEAST_STEPS = 2
"""That an estimate of the time left needs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    wall_s: float
    """Of all attempts, from the start of the ranks to their end."""
    spent: Mapping[str, float]
    """Seconds by what they went into; together they are `wall_s`. `steps` is what counts: steps whose result was kept,
    but for waiting for rows. `lost`: what an attempt did after the save that the next one began with."""
    left_s: float | None
    """To the last step, by how fast this attempt goes; None where it does not run, or has only begun."""

    @property
    def goodput(self) -> float | None:
        return self.spent["steps"] / self.wall_s if self.wall_s > 0 else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Attempt:
    number: int
    launched: float
    training: float | None
    """When the first step could begin, and after how many."""
    first: int
    ended: float


def account(run: RunDir, *, running: bool, now: float | None = None) -> Account | None:
    """From events.jsonl and metrics.jsonl; None where the run never began, or keeps no metrics."""
    events, rows = list(read_lines(run.events)), list(_of_steps(run.metrics))
    attempts = _attempts(events, time.time() if now is None else now, running=running)
    if not attempts or not run.metrics.exists():
        return None
    spent = dict.fromkeys(("steps", "data", "eval", "save", "start-up", "lost", "other"), 0.0)
    evals = list(_of_steps(run.path / "eval.jsonl"))
    saves = [event for event in events if event.get("kind") == "saved"]
    for place, one in enumerate(attempts):
        last = place + 1 == len(attempts)
        until = float("inf") if last else attempts[place + 1].first
        wall = one.ended - one.launched
        start = wall if one.training is None else one.training - one.launched
        mine = [row for row in rows if one.first < row["step"] <= until]
        data = sum(row.get("data_s") or 0.0 for row in mine)
        kept = {
            "steps": sum(row.get("step_s") or 0.0 for row in mine) - data,
            "data": data,
            "eval": sum(row.get("eval_s") or 0.0 for row in evals if one.first < row["step"] <= until),
            "save": sum(event.get("pause_s") or 0.0 for event in saves
                        if event.get("attempt") == one.number and event["step"] <= until),
        }  # fmt: skip
        rest = max(0.0, wall - start - sum(kept.values()))
        for name, seconds in {**kept, "start-up": start, "other" if last else "lost": rest}.items():
            spent[name] += seconds
    return Account(sum(spent.values()), spent, _left(run, attempts[-1], rows) if running else None)


def lost_after(run: RunDir, step: int) -> tuple[int, float]:
    """Steps beyond `step` that the run has done so far, and the seconds they took: what an attempt that begins there
    does again. To be asked before its ranks start, which take those lines away; nothing where no metrics are kept.
    """
    rows = [row for row in _of_steps(run.metrics) if row["step"] > step]
    return len(rows), sum(row.get("step_s") or 0.0 for row in rows)


def _left(run: RunDir, attempt: _Attempt, rows: Sequence[Mapping[str, Any]]) -> float | None:
    steps = run.read_manifest().get("steps")
    done = len([row for row in rows if row["step"] > attempt.first])
    if attempt.training is None or steps is None or done < _LEAST_STEPS:
        return None
    return max(0.0, (attempt.ended - attempt.training) / done * (int(steps) - attempt.first - done))


def _attempts(events: Sequence[Mapping[str, Any]], now: float, *, running: bool) -> list[_Attempt]:
    """In order; one that was killed with all of its processes ends with the last event that is known of it, and what
    the next one found it had done since.
    """
    starts = {event["attempt"]: event for event in events if event.get("kind") == "launched"}
    numbers, found = sorted(starts), []
    for place, number in enumerate(numbers):
        mine = [event for event in events if event.get("attempt") == number]
        launched = starts[number]
        training = next((event for event in mine if event["kind"] == "training"), None)
        ended = seconds_of(mine[-1]["time"])
        if place + 1 < len(numbers) and not any(event["kind"] == "ended" for event in mine):
            ended += starts[numbers[place + 1]].get("lost_s") or 0.0
        if running and number == numbers[-1]:
            ended = now
        began = None if training is None else seconds_of(training["time"])
        first = (training or launched).get("step") or 0
        found.append(_Attempt(number, seconds_of(launched["time"]), began, first, ended))
    return found


def seconds_of(text: str) -> float:
    """Of a time as `utc` writes it."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")


def _of_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Those that say of which step they are: a file that somebody has edited is no reason not to start."""
    return (row for row in read_lines(path) if isinstance(row.get("step"), int))
