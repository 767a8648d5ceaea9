"""Optimizers that keep their state in fewer bits than is shown of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class AbstractPacked(ABC):
    @abstractmethod
    def opened(self, param: torch.Tensor) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """The states of a parameter in fp32 and of its shape, by their names; on the CPU where they are copies. What
        was written to them by the end of the context is kept, as closely as it can be; none before the first update.
        """

    @abstractmethod
    def make(self, param: torch.Tensor, names: Sequence[str], updates: int) -> None:
        """States of zeros, as after so many updates."""
