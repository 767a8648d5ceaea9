"""The bits of what a rank holds, in two numbers."""

from __future__ import annotations

import torch

_CHUNK = 2**24
_PRIME = 65521
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def print_of(view: torch.Tensor) -> tuple[int, int]:
    """Two sums over the bits of a 1-D tensor's elements, one of them by place: 64-bit integers that wrap around. One
    element that is another changes the first.
    """
    bits = view.detach().view(_BITS[view.element_size()])
    plain, placed = 0, 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device) % _PRIME + 1
        plain, placed = plain + int(part.sum()), placed + int((part * place).sum())
    return plain, placed
