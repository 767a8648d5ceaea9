from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dtrain.config.spec import StrategySpec, spec
from dtrain.plan.memory import Need, StateBytes

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.plan.world import Device, Topology, World
    from dtrain.strategies.base import AbstractStrategy, Optim


@spec
class FSDP2(StrategySpec):
    """torch's `fully_shard`: each block is gathered for its forward and backward and divided again after."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Groups that hold the whole model each; ranks shard within a group and average between groups (HSDP)."""
    reshard_after_forward: bool = True
    """Divide a block again after its forward: less memory, one more gathering."""

    def misfits(self, topology: Topology, device: Device) -> list[str]:
        size = topology.size
        if size % self.replicas == 0:
            return []
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        return [f"strategy.replicas={self.replicas}: does not divide the {size} ranks; these do: {fitting}"]

    def states(self, need: Need) -> StateBytes:
        f, trained = need.figures, need.num_trainable
        over = max(1, need.topology.size // self.replicas)
        outside = f.num_params - f.layers * f.num_block_params
        blocks = 2 if self.reshard_after_forward else f.layers
        gathered = float(need.compute_bytes * (outside + blocks * f.num_block_params)) if over > 1 else 0.0
        # The reduce-scatter input of one block, fp32.
        gathered += 4.0 * f.num_block_params
        params = 4.0 * trained / over + need.frozen_on_rank(over)
        return StateBytes(params, 4.0 * trained / over, float(need.state_bytes * trained) / over, gathered)

    def build(self, world: World, comm: AbstractComm, optim: Optim) -> AbstractStrategy:
        from dtrain.strategies._fsdp2 import _FSDP2

        return _FSDP2(world, comm.device, optim, replicas=self.replicas, reshard=self.reshard_after_forward)
