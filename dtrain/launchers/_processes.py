"""Find and end the processes of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.runs.process import MARK

NODE = "DTRAIN_NODE"
"""A random name, where a run is on several machines: tells the processes of one launcher from another's."""

if TYPE_CHECKING:
    import psutil


def workers(agent: int) -> dict[int, psutil.Process]:
    """The ranks that process `agent` started on this machine, by rank. Nothing that a rank itself started."""
    import psutil

    found = {}
    try:
        children = psutil.Process(agent).children()
    except psutil.Error:
        return {}
    for child in children:
        try:
            rank = child.environ().get("RANK", "")
        except (psutil.Error, OSError):
            continue
        if rank.isdigit():
            found[int(rank)] = child
    return found


def marked(run_dir: Path, node: str | None = None) -> list[psutil.Process]:
    """Every live process of the run on this machine, in whatever session: its folder is in their environment.

    With `node`, only those of that launcher.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            env = process.environ()
            if env.get(MARK) == str(run_dir) and node in (None, env.get(NODE)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.pid != psutil.Process().pid]


def end(processes: Iterable[psutil.Process], *, patience_s: float) -> None:
    """Let them end by themselves for a while, then kill them; returns when they are gone."""
    import psutil

    _, left = psutil.wait_procs(list(processes), timeout=patience_s)
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=2)


def sweep(run_dir: Path, *, patience_s: float, node: str | None = None) -> int:
    """End what is left of the run here, or of one launcher of it; returns how many processes that took."""
    left = marked(run_dir, node)
    count = len(left)
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        end(left, patience_s=patience_s)
        left, patience_s = marked(run_dir, node), 0
    return count
