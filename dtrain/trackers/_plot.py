"""The loss curve as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]


def draw_loss(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training loss (each step, and smoothed) and evaluation loss; nothing for fewer than two points."""
    train, held_out = _points(steps), _points(evals)
    if len(train) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=1, label="train, each step")
    if len(train) >= 20:
        axes.plot(*zip(*smooth(train), strict=True), color="#1f4e8c", linewidth=2, label="train, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8551b", linewidth=1.2, marker="o", markersize=5, label="eval")
    axes.set_ylim(*limits([y for _, y in (*train, *held_out)]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target)")
    axes.set_title(path.parent.name, loc="left", fontsize=10, parse_math=False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    return [(row["step"], row["loss"]) for row in rows if row.get("step") is not None and row.get("loss") is not None]


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a thirtieth of the run, without a bias at its begin."""
    keep = 1 - 1 / max(2.0, len(points) / 30)
    mean, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range that shows all but a few spikes: from the least to a little above the 99th percentile."""
    ordered = sorted(value for value in values if math.isfinite(value))
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99))]
    room = max((high - low) * 0.06, 0.01)
    return low - room, high + room
