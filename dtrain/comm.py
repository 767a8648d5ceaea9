"""The collectives that the engine needs, as an object."""

from __future__ import annotations

import copy
import datetime
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

from dtrain.errors import DivergedError, DtrainError

if TYPE_CHECKING:
    from dtrain.plan.world import World


_LEAST = 16
"""Numbers of each reduction, at least: where ranks come with different sizes gloo ends the process."""
_LENGTHS, _STEPS = 2**6, 2**9
"""Lengths, and steps, that are told apart; so few that a sum of squares is a whole number that fp64 has."""
_WORDS, _SHOWN = 256, 4
LONG = datetime.timedelta(days=1)
"""For writing to a disk that may be slow: a rank that is gone ends the run by other ways."""


class AbstractComm(ABC):
    """All ranks of a run, as one of them. What is collective, all call in the same order."""

    rank: int
    size: int
    device: torch.device
    """Where this rank computes."""

    @abstractmethod
    def sum(self, values: Sequence[float], *, step: int | None = None) -> list[float]:
        """Element by element over all ranks, in fp64. Collective. Raises DivergedError on all of them where they are
        not at the same `step`.
        """

    @abstractmethod
    def max(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in fp64. Collective."""

    @abstractmethod
    def gather(self, value: str) -> list[str]:
        """What every rank says, in order of rank. Collective."""

    @abstractmethod
    def sibling(self) -> AbstractComm:
        """The same ranks over a group of their own, for a thread whose waits are long: its collectives and ours do not
        meet. Collective.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all. Collective."""

    def same(self, what: str, value: str) -> None:
        """Raise DtrainError unless all ranks say the same. Collective."""
        values = self.gather(value)
        differ = [f"rank {rank} has {one}" for rank, one in enumerate(values) if one != values[0]]
        if differ:
            raise DtrainError(
                f"{what}: rank 0 has {values[0]}, but {', '.join(differ[:4])}; the ranks read different "
                f"files: is the run folder on a file system that all nodes share?"
            )


@final
class TorchComm(AbstractComm):
    """Over torch's default process group. Numbers travel on the CPU by gloo, so that they never wait for a GPU."""

    def __init__(self, world: World, *, timeout_s: float = 600.0) -> None:
        """Joins the process group, or uses the one there is. Collective."""
        self.rank, self.size = world.rank, world.size
        cuda = world.device == "cuda"
        self.device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                rank=world.rank,
                world_size=world.size,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=self.device if cuda else None,
            )
        self._group: dist.ProcessGroup | None = None

    def sibling(self) -> TorchComm:
        made = copy.copy(self)
        made._group = dist.new_group(backend="gloo", timeout=LONG)
        return made

    def _reduce(self, values: Sequence[float], *, sums: bool, step: int | None = None) -> list[float]:
        """Raises DivergedError on every rank where one is elsewhere: what it says would be taken for something else."""
        mark = 1 + sums + 2 * (len(values) % _LENGTHS + _LENGTHS * ((step or 0) % _STEPS))
        # What only marks that are all the same come to: their squares in a sum, the largest and the least of them.
        head = [mark, mark**2 if sums else -mark]
        rest = max(0, _LEAST - len(head) - len(values))
        tensor = torch.tensor([*head, *values, *[0.0] * rest], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if sums else dist.ReduceOp.MAX, group=self._group)
        first, second, *found = tensor.tolist()
        if (self.size * int(second) != int(first) ** 2) if sums else (first, second) != (mark, -mark):
            raise DivergedError(self._where(step))
        return found[: len(values)]

    def _where(self, step: int | None) -> str:
        """Which ranks are elsewhere than most. Collective, whatever they were about."""
        names = [
            frame.f_code.co_name for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename != __file__
        ]
        words = " < ".join(names[:2]) + (f" at step {step}" if step is not None else "")
        mine = torch.zeros(_WORDS, dtype=torch.uint8)
        raw = words.encode()[:_WORDS]
        mine[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        said = [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in parts]
        ((usual, times), *_) = Counter(said).most_common()
        most = times * 2 > len(said)
        odd = [f"rank {rank} in {one}" for rank, one in enumerate(said) if not most or one != usual]
        return (f"ranks are not at the same place: {', '.join(odd[:_SHOWN])}"
                f"{f' and {len(odd) - _SHOWN} more' * (len(odd) > _SHOWN)}{f'; the others in {usual}' * most}. A step, "
                f"or a part of one, was left out there or done twice, as where code of your own has caught an error. "
                f"The same command goes on from the newest checkpoint")  # fmt: skip

    def sum(self, values: Sequence[float], *, step: int | None = None) -> list[float]:
        return self._reduce(values, sums=True, step=step)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, sums=False)

    def gather(self, value: str) -> list[str]:
        raw = value.encode()
        length = int(self.max([len(raw)])[0])
        mine = torch.zeros(length + 8, dtype=torch.uint8)
        mine[: 8 + len(raw)] = torch.tensor(list(len(raw).to_bytes(8, "big") + raw), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        texts = [bytes(part.tolist()) for part in parts]
        return [text[8 : 8 + int.from_bytes(text[:8], "big")].decode() for text in texts]

    def barrier(self) -> None:
        self.sum([0.0])
