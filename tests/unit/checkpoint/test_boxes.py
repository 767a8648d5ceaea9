"""Any flat range is a few boxes, and any box a few ranges: against numpy's own indexing."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.checkpoint.boxes import Box, boxes, runs

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape) - 1))
    return shape, start, draw(st.integers(1, math.prod(shape) - start))


@st.composite
def some_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(SHAPES)
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return shape, Box(offset, tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, offset, strict=True)))


def _elements(shape: tuple[int, ...], box: Box) -> list[int]:
    """Flat places of a box's elements, in its own order, as numpy has them."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    return whole[tuple(slice(at, at + size) for at, size in zip(box.offset, box.sizes, strict=True))].ravel().tolist()


@settings(deadline=None)
@given(ranges())
def test_a_range_as_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, numel = case
    found = boxes(shape, start, numel)
    assert [at for box in found for at in _elements(shape, box)] == list(range(start, start + numel))
    assert len(found) <= max(1, 2 * (len(shape) - 1) + 1)


@settings(deadline=None)
@given(some_box())
def test_a_box_as_ranges(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    found = list(runs(shape, box))
    assert [at for start, numel in found for at in range(start, start + numel)] == _elements(shape, box)
    assert len(found) <= max(1, math.prod(box.sizes[:-1]))


@settings(deadline=None)
@given(ranges())
def test_a_box_of_a_range_is_one_range(case: tuple[tuple[int, ...], int, int]) -> None:
    """So that a file of boxes can be written straight from the flat range."""
    shape, start, numel = case
    assert all(len(list(runs(shape, box))) == 1 for box in boxes(shape, start, numel))


def test_by_hand() -> None:
    # Of 2 x 3 x 4: the last 2 of a row of 4, the rest of the first 3 x 4, and 1 row and 1 element of the second.
    assert boxes((2, 3, 4), 2, 15) == [
        Box((0, 0, 2), (1, 1, 2)), Box((0, 1, 0), (1, 2, 4)), Box((1, 0, 0), (1, 1, 4)), Box((1, 1, 0), (1, 1, 1)),
    ]  # fmt: skip
    assert boxes((2, 3, 4), 0, 24) == [Box((0, 0, 0), (2, 3, 4))]
    assert boxes((), 0, 1) == [Box((), ())]
    assert boxes((7,), 3, 2) == [Box((3,), (2,))]
    assert boxes((2, 3), 4, 0) == []
    assert list(runs((2, 3, 4), Box((0, 1, 0), (2, 2, 4)))) == [(4, 8), (16, 8)]
    assert list(runs((), Box((), ()))) == [(0, 1)]
