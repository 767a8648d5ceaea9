from __future__ import annotations

from typing import TYPE_CHECKING

from dtrain.config.spec import StrategySpec, spec
from dtrain.plan.memory import Need, StateBytes

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.plan.world import World
    from dtrain.strategies.base import AbstractStrategy, Optim


@spec
class DDP(StrategySpec):
    """A whole replica on every rank; gradients are averaged in one reduction per step."""

    bucket_mb: float = 25.0
    """Gradients are reduced in buckets of this size (2^20 bytes), as the backward pass fills them. fp32 only."""

    def problems(self) -> list[str]:
        return [] if self.bucket_mb > 0 else [f"strategy.bucket_mb={self.bucket_mb}: must be more than 0"]

    def states(self, need: Need) -> StateBytes:
        trained = need.num_trainable
        gathered = 0.0 if need.precision == "fp32" else 2.0 * need.num_trainable
        return StateBytes(
            4.0 * trained + need.frozen_bytes,
            4.0 * trained,
            float(need.state_bytes * trained),
            gathered,
        )

    def build(self, world: World, comm: AbstractComm, optim: Optim) -> AbstractStrategy:
        if optim.precision == "fp32":
            from dtrain.strategies._ddp import _DDP

            return _DDP(self, world, comm.device, optim)
        # Low precision with fp32 masters and fp32 reduction: torch's DDP has no such mode, fully_shard with shards of
        # one rank and a replica on each does exactly that.
        from dtrain.strategies._fsdp2 import _FSDP2

        return _FSDP2(world, comm.device, optim, replicas=world.size, reshard=False)
