"""An error on the screen: the only place that prints one."""

from __future__ import annotations

import sys

from dtrain.errors import DtrainError


def report(error: DtrainError) -> int:
    """Print an error, each of its lines a problem but for those that are set in; returns the exit code."""
    from dtrain.runs import scrub

    lines = [line for line in scrub(str(error)).splitlines() if line.strip()] or [type(error).__name__]
    problems = [line for line in lines if not line.startswith(" ")]
    if len(problems) > 1:
        print(f"{len(problems)} problems:", file=sys.stderr)
    for line in lines:
        print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
    return error.exit_code
