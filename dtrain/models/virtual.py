"""Places that come before every document of a row without being tokens of it: what prompt methods train."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import nn

from dtrain.errors import ModelError


class AbstractVirtual(ABC):
    """What stands at the places before each document."""

    num: int
    """Of places."""
    attended: bool
    """Whether it is what attention finds there, rather than what the decoder is given."""

    @abstractmethod
    def values(self, device: torch.device) -> torch.Tensor:
        """Embeddings [num, hidden]; where `attended`, keys and values [layers, 2, num, heads, width]."""


class Wide(NamedTuple):
    """Rows with places before their documents."""

    tokens: torch.Tensor
    """[B, W] int64; 0 where there is no token of the row."""
    positions: torch.Tensor
    """[B, W] int64, from 0 at the first place before a document."""
    slots: torch.Tensor
    """[D*num] int64: flat positions in [0, B*W) of the places, document after document."""
    where: torch.Tensor
    """[B*T] int64: the flat position in [0, B*W) of what was at each flat position before."""


def widen(tokens: torch.Tensor, positions: torch.Tensor, num: int) -> Wide:
    """Put `num` places before every document of rows [B, T], whose positions start at 0 in each; padding counts as a
    document. Rows that are shorter then than the longest end in a document of nothing.
    """
    (rows, width), device = tokens.shape, tokens.device
    starts = positions == 0
    before = num * starts.cumsum(1)
    lengths = width + before[:, -1:]
    wide = int(lengths.max())
    offset = torch.arange(rows, device=device)[:, None] * wide
    where = (offset + torch.arange(width, device=device) + before).reshape(-1)
    places = torch.arange(num, device=device)
    slots = (where[starts.reshape(-1)][:, None] - num + places).reshape(-1)
    new_tokens = torch.zeros(rows * wide, dtype=tokens.dtype, device=device)
    new_tokens[where] = tokens.reshape(-1)
    new_positions = (torch.arange(wide, device=device) - lengths).reshape(-1)
    new_positions[where] = positions.reshape(-1) + num
    new_positions[slots] = places.repeat(len(slots) // max(1, num))
    return Wide(new_tokens.view(rows, wide), new_positions.view(rows, wide), slots, where)


@final
class Attended:
    """Keys and values that stand at some places of a batch, in the form of a cache of transformers.

    Layers hand their keys and values to a cache once these are what is attended to, and go on with what it gives back.
    """

    def __init__(self, values: torch.Tensor, slots: torch.Tensor) -> None:
        """`values`: [layers, 2, num, heads, width]; `slots`: flat places, those of a document after another."""
        self._values, self._slots = values, slots

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, heads, W, width] each."""
        return self._put(keys, self._values[layer, 0]), self._put(values, self._values[layer, 1])

    def _put(self, into: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = into.shape
        flat = into.transpose(1, 2).reshape(batch * length, heads, width)
        all_of_it = what.to(into.dtype).repeat(len(self._slots) // len(what), 1, 1)
        return flat.index_copy(0, self._slots, all_of_it).view(batch, length, heads, width).transpose(1, 2)


def hand_over(blocks: Sequence[nn.Module], now: list[Attended]) -> None:
    """Have the layers take as their cache the one that `now` holds when they run, and none where it is empty.

    The decoder is not to hear of it: with a cache transformers takes no document for the beginning of another. Raises
    ModelError for layers that take none.
    """
    for block in blocks:
        if "past_key_values" not in inspect.signature(block.forward).parameters:
            raise ModelError(f"{type(block).__name__}: its attention takes no keys and values from outside; use "
                             f"tuning=prompt or ptuning, which need none")  # fmt: skip

    def with_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, ({**kwargs, "past_key_values": now[0]} if now else kwargs)

    for block in blocks:
        block.register_forward_pre_hook(with_cache, with_kwargs=True)
