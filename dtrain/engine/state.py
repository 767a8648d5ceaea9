"""Where a run is: what a failure names."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Progress:
    """Mutable on purpose: the worker reads it when something breaks."""

    phase: str = "start"
    """start, join, load, train, eval, export."""
    step: int = 0
    """Optimizer steps done."""
