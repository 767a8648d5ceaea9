"""The loss curve, and a confusion matrix, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from dtrain.trackers.base import Confusion

Point = tuple[float, float]
_WRITTEN = 30
"""Labels up to which the counts are written into the picture."""
_FONT = "DejaVu Sans"
"""What comes with matplotlib: Latin, Greek, Cyrillic, Arabic and others, and no Chinese, Japanese or Korean."""


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


def draw_confusion(found: Confusion, to: Path | BinaryIO, title: str) -> None:
    """Draw how often each label was taken for each, coloured by the share of the label's own texts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(found.labels)
    totals = [max(1, sum(row)) for row in found.counts]
    shares = [[count / total for count in row] for row, total in zip(found.counts, totals, strict=True)]
    size = min(20.0, max(4.0, 2.0 + 0.5 * num))
    figure = Figure(figsize=(size, size), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    names = [label if len(label) <= 24 else label[:23] + "…" for label in found.labels]
    families = fonts_for("".join(names))
    if families is None:
        names, families = [f"label {i}" for i in range(1, num + 1)], [_FONT]
        title += "\nno font here has these labels:\nthey are in the order of confusion.json"
    axes.set_xticks(range(num), names, rotation=45, ha="right", family=families, parse_math=False)
    axes.set_yticks(range(num), names, family=families, parse_math=False)
    axes.set_xlabel("chosen")
    axes.set_ylabel("label")
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    for i, row in enumerate(found.counts if num <= _WRITTEN else []):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.6 else "black")
    figure.savefig(to, format="png")


def fonts_for(text: str) -> list[str] | None:
    """Families that together have every character: matplotlib's own, and where it lacks some the first one installed
    that has them all; None where there is none.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    lacks = {ord(one) for one in text} - get_font(findfont(FontProperties(family=[_FONT]))).get_charmap().keys()
    if not lacks:
        return [_FONT]
    families = {one.fname: one.name for one in fontManager.ttflist if not one.name.startswith("Last Resort")}  # boxes
    for path, family in sorted(families.items()):
        try:
            if lacks <= get_font(path).get_charmap().keys():
                return [_FONT, family]
        except (OSError, RuntimeError):  # it was removed since matplotlib listed it, or is damaged
            continue
    return None
