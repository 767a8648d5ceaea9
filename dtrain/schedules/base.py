"""What all schedules share: warm-up in a straight line, counted in optimizer steps."""

from __future__ import annotations


def warmup(step: int, warmup_steps: int) -> float:
    """Factor of the learning rate in step `step` (from 0): 1/w, 2/w, ... 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def progress(step: int, steps: int, warmup_steps: int) -> float:
    """How much of what follows the warm-up lies behind step `step`: 0 at its first step, 1 after the last."""
    return min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))
