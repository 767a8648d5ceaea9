"""Labels that matplotlib's own font cannot write."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dtrain.trackers import _plot
from dtrain.trackers.base import Confusion

FOUND = Confusion(("积极", "消极"), ((10, 2), (3, 40)))


def drawn(path: Path) -> list[str]:
    """The texts of the picture."""
    from matplotlib.figure import Figure

    texts: list[str] = []

    def savefig(figure: Figure, to: Path, **options: object) -> None:
        axes = figure.axes[0]
        texts.extend([axes.get_title(loc="left"), *(one.get_text() for one in axes.get_xticklabels())])
        plain(figure, to, **options)

    plain = Figure.savefig
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is a warning, and a box in the picture
        patch.setattr(Figure, "savefig", savefig)
        _plot.draw_confusion(FOUND, path, "step 3")
    assert path.stat().st_size > 1000
    return texts


def test_drawn_where_a_font_has_them_and_where_none_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _plot.fonts_for("".join(FOUND.labels)) is not None
    assert drawn(tmp_path / "a.png")[1:] == (list(FOUND.labels) if here else ["label 1", "label 2"])
    monkeypatch.setattr(_plot, "fonts_for", lambda text: None)
    assert drawn(tmp_path / "b.png") == [
        "step 3\nno font here has these labels:\nthey are in the order of confusion.json", "label 1", "label 2",
    ]  # fmt: skip


def test_a_family_is_looked_for_only_where_it_is_needed() -> None:
    assert _plot.fonts_for("good, très bon, хорошо") == ["DejaVu Sans"]
    assert _plot.fonts_for("\U000f0000") is None  # of private use: in no font
