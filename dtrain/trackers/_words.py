"""Figures as people read them."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """1234567 -> 1.23M, 2000 -> 2.00k: as wide each time, so that lines below each other stay in columns."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def size(num_bytes: float) -> str:
    """3221225472 -> 3.0 GiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """3725 -> 1h02m; 62 -> 1m02s."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{seconds:.0f}s"
