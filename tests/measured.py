"""What a test has measured of a fault: goes into its report, and from there into the table of docs/reliability.md."""

from __future__ import annotations

DETECTED, LOST = "detected_s", "lost_steps"
_found: dict[str, float] = {}


def detected(seconds: float) -> None:
    """From the fault to the word of it; of several, the longest counts."""
    _found[DETECTED] = max(seconds, _found.get(DETECTED, 0.0))


def lost(steps: int) -> None:
    """Steps that were trained and had to be done again."""
    _found[LOST] = max(steps, _found.get(LOST, 0))


def taken() -> dict[str, float]:
    """All of it, once."""
    found = dict(_found)
    _found.clear()
    return found
