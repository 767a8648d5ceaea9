from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import StrategySpec, spec
from dtrain.plan.memory import Need, StateBytes

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.plan.world import Device, Topology, World
    from dtrain.strategies.base import AbstractStrategy, Optim

Count = Annotated[int, Field(ge=1)]
Where = Literal["none", "cpu", "nvme"]


@spec
class ZeRO(StrategySpec):
    """DeepSpeed ZeRO (arXiv 1910.02054). Fields bear DeepSpeed's names, without the prefix `stage3_`."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "train_batch_size": "batch.global_batch",
        "train_micro_batch_size_per_gpu": "batch.micro_batch",
        "gradient_accumulation_steps": "batch.global_batch and batch.micro_batch; the rest is worked out",
        "gradient_clipping": "train.grad_clip",
        "optimizer": "optim=<choice> and its keys",
        "scheduler": "schedule=<choice> and its keys",
        "bf16": "train.precision=bf16",
        "fp16": "train.precision=fp16",
        "torch_autocast": "train.precision",
        "zero_optimization": "the keys of strategy= themselves, as in strategy.offload_optimizer",
    }

    by_choice: ClassVar[Mapping[str, str]] = {"stage": "strategy=zero1, zero2 or zero3"}

    stage: Literal[1, 2, 3]
    offload_optimizer: Where = "none"
    """Where optimizer state and master weights are kept, and updated."""
    offload_param: Where = "none"
    """Where partitioned parameters are kept; stage 3."""
    nvme_path: str = ""
    """Folder on a local NVMe disk, for offload to `nvme`."""
    pin_memory: bool = True
    """Page-locked host memory for offload: faster copies, cannot be swapped out. CUDA only."""
    reduce_bucket_size: Count = 500_000_000
    """Elements reduced at a time."""
    allgather_bucket_size: Count = 500_000_000
    """Elements gathered at a time after the update; stages 1 and 2."""
    overlap_comm: bool = False
    """Reduce while the backward pass goes on; takes more memory. Stages 2 and 3."""
    prefetch_bucket_size: Annotated[int, Field(ge=0)] = 50_000_000
    """Elements fetched ahead; stage 3."""
    param_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Parameters with fewer elements stay whole on every rank; stage 3."""
    max_live_parameters: Count = 1_000_000_000
    """Most elements that are whole on a device at a time; stage 3."""
    max_reuse_distance: Annotated[int, Field(ge=0)] = 1_000_000_000
    """A parameter that is used again within so many elements is not divided in between; stage 3."""
    sub_group_size: Count = 1_000_000_000
    """Elements updated at a time; stage 3."""
    zero_hpz_partition_size: Count = 1
    """ZeRO++ (arXiv 2306.10209): ranks, as a rule those of a node, that keep a second copy to gather from; stage 3."""
    zero_quantized_weights: bool = False
    """ZeRO++: gather weights in int8. Not exact. CUDA, stage 3."""
    zero_quantized_gradients: bool = False
    """ZeRO++: reduce gradients in int4. Not exact. CUDA, stage 3."""

    def problems(self) -> list[str]:
        found = []
        if self.stage != 3:
            for key in (
                "offload_param",
                "zero_hpz_partition_size",
                "zero_quantized_weights",
                "zero_quantized_gradients",
            ):
                value = getattr(self, key)
                if value not in ("none", 1, False):
                    found.append(f"strategy.{key}={value}: only for stage 3, not {self.stage}; use strategy=zero3")
        if self.stage == 1 and self.overlap_comm:
            found.append("strategy.overlap_comm=True: only for stages 2 and 3")
        nvme = self.on_nvme()
        if nvme and not self.nvme_path:
            found.append(f"strategy.{nvme[0]}=nvme: strategy.nvme_path is not given; name a folder on a local disk")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            found.append(
                f"strategy.offload_optimizer=nvme: only for stage 3, not {self.stage}; use cpu, or strategy=zero3"
            )
        return found

    def on_nvme(self) -> list[str]:
        """The keys that keep something there."""
        return [key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "nvme"]

    def unsavable(self) -> str | None:
        nvme = self.on_nvme()
        return f"strategy.{nvme[0]}=nvme: DeepSpeed alone reads and writes what it keeps there" if nvme else None

    def misfits(self, topology: Topology, device: Device) -> list[str]:
        found = []
        if topology.size % self.zero_hpz_partition_size:
            found.append(f"strategy.zero_hpz_partition_size={self.zero_hpz_partition_size}: does not divide the "
                         f"{topology.size} ranks; as a rule it is the {topology.procs_per_node} of a node")  # fmt: skip
        if device != "cuda":
            quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if getattr(self, key)]
            found += [f"strategy.{key}=true: needs CUDA, and these ranks compute on {device}" for key in quantized]
        return found

    def states(self, need: Need) -> StateBytes:
        f, trained, over = need.figures, need.num_trainable, need.topology.size
        low = need.compute_bytes
        grads_over, params_over = (over if self.stage >= 2 else 1), (over if self.stage == 3 else 1)
        # fp32 masters beside the parameters, except in stage 3 with fp32, where they are the parameters.
        master = 0.0 if self.stage == 3 and low == 4 else 4.0 * trained / over
        params = float(low * trained) / params_over + need.frozen_on_rank(params_over)
        grads = 4.0 * trained / grads_over
        optim = float(need.state_bytes * trained) / over + master
        gathered = float(low * min(f.num_params, self.max_live_parameters)) if self.stage == 3 and over > 1 else 0.0
        if self.stage == 3 and over > 1:
            outside = f.num_params - f.layers * f.num_block_params
            unit = outside + f.num_block_params + min(self.prefetch_bucket_size, f.num_params)
            reused = min(self.max_reuse_distance, f.num_params)
            gathered = float(low * min(self.max_live_parameters, max(unit, reused)))
        gathered += 4.0 * min(self.reduce_bucket_size, trained)
        host = 0.0
        if self.offload_optimizer != "none":
            host, optim = host + optim, 0.0
        if self.offload_param != "none":
            host, params = host + params, 0.0
        return StateBytes(params, grads, optim, gathered, host)

    def build(self, world: World, comm: AbstractComm, optim: Optim) -> AbstractStrategy:
        from dtrain.strategies._zero import _ZeRO

        return _ZeRO(self, world, comm.device, optim)
