"""Whether a batch script is to queue its job again: told by a file, since exit codes do not pass through launchers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.runs.process import BATCH

if TYPE_CHECKING:
    from dtrain.runs import Outcome, RunDir

FAILURES = ("worker", "hang", "storage", "lost", "launcher")
"""Kinds that may be the machine's fault; what the user typed, and a loss that is no number, come again."""


def forget(run: RunDir) -> None:
    """Remove what was asked of an earlier start; what the script of this one has asked stays."""
    run.joined.unlink(missing_ok=True)
    if not is_of_this_start(run.requeue):
        run.requeue.unlink(missing_ok=True)


def is_of_this_start(path: Path) -> bool:
    """Whether a file was made by the batch script that has started this, or for it."""
    batch = os.environ.get(BATCH)
    try:
        return batch is not None and path.read_text(encoding="utf-8").strip() == batch
    except FileNotFoundError:
        return False


def ask(run: RunDir) -> bool:
    """Ask the batch script for another start; False where none has started this, or the disk takes no file."""
    batch = os.environ.get(BATCH)
    if batch is None:
        return False
    try:
        run.requeue.write_text(batch + "\n", encoding="utf-8")
    except OSError:
        return False
    return True


def decide(run: RunDir, outcome: Outcome, max_restarts: int, say: Callable[[str], None]) -> None:
    """Ask the batch script, where one has started this, for another start: where the time was over, or after a failure
    that may not come again.
    """
    from dtrain.runs.outcomes import BY_SCHEDULER

    if BATCH not in os.environ:
        return
    if outcome.kind == "stopped":
        again = outcome.reason in BY_SCHEDULER
    elif outcome.kind in FAILURES and max_restarts:
        why_not = refusal(run.read_manifest().get("attempts", []), max_restarts)
        say(f"not queued again: {why_not}" if why_not else
            f"launcher.max_restarts={max_restarts}: the job is to be queued again")  # fmt: skip
        again = why_not is None
    else:
        again = False
    if again and not ask(run):
        say(f"not queued again: {run.requeue} could not be written")


def failed_in_a_row(attempts: Sequence[Mapping[str, Any]]) -> int:
    """How many of the last attempts ended with a failure that may not come again."""
    return len(_failed(attempts))


def _failed(attempts: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps that those began at, the last one first."""
    failed = []
    for one in reversed(attempts):
        if one.get("ended") not in FAILURES:
            break
        failed.append(int(one.get("first_step") or 0))
    return failed


def refusal(attempts: Sequence[Mapping[str, Any]], max_restarts: int) -> str | None:
    """Why a run whose last attempts were these is not started again; None where it is."""
    failed = _failed(attempts)
    if len(failed) > max_restarts:
        return f"it has failed {len(failed)} times in a row, and launcher.max_restarts={max_restarts}"
    if len(failed) >= 2 and failed[0] == failed[1]:
        return f"two attempts in a row began at step {failed[0]} and failed: no progress"
    return None
