"""How many processes, where, and which one this is; what torchrun and its like set is checked here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Literal

from dtrain.errors import ConfigError

Device = Literal["cpu", "cuda"]


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """What a launcher will start."""

    nodes: int
    procs_per_node: int

    @property
    def size(self) -> int:
        return self.nodes * self.procs_per_node


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """Which process this is, of how many."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Device

    @property
    def topology(self) -> Topology:
        assert self.size % self.local_size == 0, (self.size, self.local_size)
        return Topology(nodes=self.size // self.local_size, procs_per_node=self.local_size)

    @classmethod
    def from_env(cls, device: Device, env: Mapping[str, str] = os.environ) -> World:
        """From what torchrun and deepspeed set; one process where nothing is set. Raises ConfigError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [name for name in names if name in env]
        if not given:
            return cls(rank=0, size=1, local_rank=0, local_size=1, device=device)
        missing = [name for name in names[:3] if name not in env]
        if missing:
            raise ConfigError(f"{', '.join(given)} set in the environment but not {', '.join(missing)}: start dtrain "
                              f"with `dtrain launch`, or with torchrun, which sets them all")  # fmt: skip
        rank, size, local_rank = (int(env[name]) for name in names[:3])
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device)
