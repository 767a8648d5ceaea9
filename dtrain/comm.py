"""The collectives that the engine needs, as an object: with processes (torch) or without (solo)."""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from dtrain.plan.world import World


class AbstractComm(ABC):
    rank: int
    size: int

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
    def barrier(self) -> None:
        """Wait for all. Collective."""

    def same(self, what: str, value: str) -> None:
        """Assert that all ranks say the same. Collective."""
        values = self.gather(value)
        differ = [f"rank {rank} has {one}" for rank, one in enumerate(values) if one != values[0]]
        assert not differ, f"{what}: rank 0 has {values[0]}, but {', '.join(differ[:4])}"


@final
class SoloComm(AbstractComm):
    rank, size = 0, 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: str) -> list[str]:
        return [value]

    def barrier(self) -> None: ...


@final
class TorchComm(AbstractComm):
    """Over torch's default process group. Numbers travel on the CPU by gloo, so that they never wait for a GPU."""

    def __init__(self, world: World, *, timeout_s: float = 600.0) -> None:
        """Joins the process group, or uses the one there is. Collective."""
        self.rank, self.size = world.rank, world.size
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if world.device == "cuda" else "gloo"
            device = torch.device("cuda", world.local_rank) if world.device == "cuda" else None
            if device is not None:
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend, rank=world.rank, world_size=world.size, timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device,
            )  # fmt: skip

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()  # type: ignore[no-any-return]

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
        dist.all_gather(parts, mine)
        texts = [bytes(part.tolist()) for part in parts]
        return [text[8 : 8 + int.from_bytes(text[:8], "big")].decode() for text in texts]

    def barrier(self) -> None:
        self.sum([0.0])
