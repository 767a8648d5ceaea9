"""A worker's own process: where its output goes, and whom it may not outlive."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TextIO

from dtrain.runs.folder import RunDir

MARK = "DTRAIN_RUN"
"""Set to the run folder in the environment of every process of a run, so that none is left behind."""

ATTEMPT = "DTRAIN_ATTEMPT"
"""In the environment of every rank: the number of the attempt."""

DEADLINE = "DTRAIN_DEADLINE"
"""By the clock, in seconds, when the ranks are to have saved and ended; a batch script sets it, or the launcher."""

BATCH = "DTRAIN_BATCH"
"""Set by a batch script to a name for this start of its job: the job's number, and how often it was queued again."""

REHEARSAL = "DTRAIN_REHEARSAL"
"""In the environment of every rank of a rehearsal: how many steps an attempt makes."""


def redirect(run: RunDir, attempt: int, rank: int) -> TextIO:
    """Send this process's stdout and stderr, of C libraries too, to the rank's log; returns the stdout it had."""
    sys.stdout.flush()
    sys.stderr.flush()
    path = run.log(attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    return os.fdopen(kept, "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when the one that started it ends. Does nothing off Linux."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signum), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signum)
