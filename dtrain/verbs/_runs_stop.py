"""Have a run save and end."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from dtrain.errors import RunError

if TYPE_CHECKING:
    from dtrain.runs import Holder, RunDir

LOOK_S = 0.2
_ASK = "whoever started it can stop it"
TWICE_S = 0.5
"""Between two signals, for the launcher not to take them for one."""


def stop(run: RunDir, *, now: bool, wait_s: float) -> int:
    """Ask it, and wait for its end; the exit code is 0 where it has ended. Raises RunError where it does not run."""
    from dtrain.runs.listing import RUNNING, summary

    holder, state = run.holder(), summary(run).state
    if holder is None or state not in RUNNING:
        more = "; a scheduler has it: scancel its job" if state == "queued" else ""
        raise RunError(f"{run.path}: it is {state}, so there is nothing to stop{more}")
    _ask(run, holder, now=now)
    deadline = time.monotonic() + wait_s
    while run.holder() is not None:
        if time.monotonic() > deadline:
            print(f"{run.path}: it has not ended within {wait_s:g} s; it stops after the step that it is in, and saves")
            return 3
        time.sleep(LOOK_S)
    outcome = run.read_outcome()
    print("ended" if outcome is None else f"{outcome.kind}: {outcome.message}")
    return 0


def _ask(run: RunDir, holder: Holder, *, now: bool) -> None:
    if not holder.is_here:
        if now:
            raise RunError(f"--now: it runs on {holder.host}; type it there")
        try:
            run.stop_trigger.touch()
        except OSError as error:
            raise RunError(f"{run.stop_trigger}: cannot be made ({error.strerror}); {_ASK}") from None
        print(f"{run.stop_trigger} is made: rank 0 looks for it each second; a job of a scheduler is queued again then")
        return
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except PermissionError:
        raise RunError(f"{run.path}: {holder} is somebody else's; {_ASK}") from None
    if now:
        time.sleep(TWICE_S)
        os.kill(holder.pid, signal.SIGTERM)
