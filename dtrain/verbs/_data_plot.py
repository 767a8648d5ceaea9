"""Lengths of documents as a PNG."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.verbs._data_stats import Stats

_BINS = 60


def draw_lengths(stats: Stats) -> bytes:
    """How many documents, and how many tokens in them, there are of each length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = stats.train.lengths
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, weights, label in zip(figure.subplots(1, 2), (None, lengths), ("documents", "tokens"), strict=True):
        axes.hist(lengths, bins=min(_BINS, int(lengths.max())), weights=weights, color="#1f4e8c")
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel(label)
        axes.grid(visible=True, axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(lengths):,} documents, {stats.train.num_tokens:,} tokens, "
                    f"{stats.train.num_targets / stats.train.num_tokens:.1%} trained, "
                    f"rows of {stats.max_length:,} {stats.fill:.1%} full", fontsize=10)  # fmt: skip
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
