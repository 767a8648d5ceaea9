"""Between flat ranges of a parameter, which strategies own, and N-d boxes of it, which files hold.

A box can be read by plain tools, and by a rank that owns a slice along any dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """Elements [offset, offset + sizes) of a tensor, along each of its dimensions."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, numel: int) -> list[Box]:
    """The flat range [start, start + numel) of a row-major tensor as boxes, in order: at most 2 * (ndim - 1) + 1.

    Each box is contiguous in memory, and each begins where the one before it ends.
    """
    if numel <= 0:
        return []
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (numel,))]
    inner, end = math.prod(shape[1:]), start + numel
    found = []
    if start % inner:  # the rest of a row
        row, column = divmod(start, inner)
        first = min(end - start, inner - column)
        found += [Box((row, *b.offset), (1, *b.sizes)) for b in boxes(shape[1:], column, first)]
        start += first
    row, num_rows = start // inner, (end - start) // inner
    if num_rows > 0:
        found.append(Box((row, *(0 for _ in shape[1:])), (num_rows, *shape[1:])))
        start += num_rows * inner
    if start < end:  # the beginning of a row
        found += [Box((start // inner, *b.offset), (1, *b.sizes)) for b in boxes(shape[1:], 0, end - start)]
    return found


def runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The box as flat ranges (start, numel) of the tensor, in the order in which the box's own elements lie."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # Dimensions from the last on that the box spans whole are one range with the one before them.
    whole = len(shape)
    while whole > 0 and box.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    outer, numel = max(0, whole - 1), math.prod(box.sizes[max(0, whole - 1) :])
    if numel == 0:
        return
    base = sum(at * stride for at, stride in zip(box.offset, strides, strict=True))
    for place in range(math.prod(box.sizes[:outer])):
        at = base
        for dim in reversed(range(outer)):
            place, index = divmod(place, box.sizes[dim])
            at += index * strides[dim]
        yield at, numel
