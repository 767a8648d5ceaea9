"""The collectives that the engine needs, as an object."""

from __future__ import annotations

import copy
import datetime
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

from dtrain.errors import DtrainError

if TYPE_CHECKING:
    from dtrain.plan.world import World


LONG = datetime.timedelta(days=1)
"""For writing to a disk that may be slow: a rank that is gone ends the run by other ways."""


class AbstractComm(ABC):
    """All ranks of a run, as one of them. What is collective, all call in the same order."""

    rank: int
    size: int
    device: torch.device
    """Where this rank computes."""

    @abstractmethod
    def sum(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in fp64. Collective."""

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

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self._group)
        return tensor.tolist()

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

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
