"""Whether a run that failed is started again here, and how long to wait before that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.runs.outcomes import JOINED, LEFT
from dtrain.runs.process import BATCH
from dtrain.verbs import _oom
from dtrain.verbs._requeue import FAILURES, failed_in_a_row, refusal

if TYPE_CHECKING:
    from dtrain.config.schema import Config
    from dtrain.config.spec import Gathering, Restarts
    from dtrain.runs import Outcome, RunDir
    from dtrain.verbs._told import Wish

MOST_S = 600.0
"""The longest wait."""
LOST_WITHOUT_PROGRESS = 5
"""So often in a row may a machine leave before another step is saved: more is no accident, but perhaps one machine that
comes back each time and whose memory is too small."""


def wait_s(first_s: float, failed: int) -> float:
    """Before the start that follows so many failures in a row: each time twice as long."""
    return min(MOST_S, first_s * 2.0 ** (failed - 1))


def again(run: RunDir, outcome: Outcome, settled: Config, wish: Wish, say: Callable[[str], None]) -> bool:
    """Whether the run is to be started again now, once it has waited for that. To be called by the holder of the run's
    lock.
    """
    return (_oom.again(run, outcome, settled, say) or with_others(run, outcome, settled.launcher.gathering(), say)
            or after_failure(run, outcome, settled.launcher.restarts(), wish, say))  # fmt: skip


def with_others(run: RunDir, outcome: Outcome, gathering: Gathering, say: Callable[[str], None]) -> bool:
    """The same where a machine has left or come, and the run may do with fewer or more. No failure is counted but
    `LOST_WITHOUT_PROGRESS`.
    """
    changed = outcome.kind == "lost" or (outcome.kind == "stopped" and outcome.reason in (JOINED, LEFT))
    if gathering.least is None or not changed:
        return False
    last = run.read_manifest().get("attempts", [])[-LOST_WITHOUT_PROGRESS:]
    if (len(last) == LOST_WITHOUT_PROGRESS and all(one.get("ended") == "lost" for one in last)
            and len({one.get("first_step") for one in last}) == 1):  # fmt: skip
        say(
            f"{outcome.message}: not started again: {len(last)} attempts in a row began at step "
            f"{last[0]['first_step']} and lost a machine; look at why, or save more often: checkpoint.every_minutes"
        )
        return False
    say(f"{outcome.message}: all meet anew, at least {gathering.least}")
    return True


def after_failure(run: RunDir, outcome: Outcome, restarts: Restarts, wish: Wish, say: Callable[[str], None]) -> bool:
    """The same of a failure that may not come again; a batch script starts its own. While it waits no rank runs: a
    signal ends it as it would before the first start, so that a pod which is told to go is made again.
    """
    if os.environ.get(BATCH) or outcome.kind not in FAILURES or not restarts.most:
        return False
    attempts = run.read_manifest().get("attempts", [])
    if not restarts.counts_lost:
        if outcome.kind == "lost":  # `with_others` has said why not
            return False
        attempts = [one for one in attempts if one.get("ended") != "lost"]
    why_not = refusal(attempts, restarts.most)
    if why_not is not None:
        say(f"not started again: {why_not}")
        return False
    failed = failed_in_a_row(attempts)
    seconds = wait_s(restarts.wait_s, failed)
    say(f"launcher.max_restarts={restarts.most}: start {failed} after a failure ({outcome.kind}) in {seconds:.0f} s")
    run.event("restart", attempt=outcome.attempt, outcome=outcome.kind, wait_s=seconds)
    deadline = time.monotonic() + seconds
    with wish.watching(), run.beating():
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
    return True
