"""From frozen values to live things: model, tuning, strategy, objective, in the order in which it must be done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain.checkpoint.export import write_export
from dtrain.engine.engine import Course, Engine
from dtrain.errors import DtrainError
from dtrain.plan.batch import BatchPlan
from dtrain.plan.machine import peak_flops
from dtrain.strategies.base import AbstractStrategy, Optim

if TYPE_CHECKING:
    from pathlib import Path

    from dtrain.comm import AbstractComm
    from dtrain.config.schema import Config
    from dtrain.data.store import RowStore
    from dtrain.models.base import ModelBundle
    from dtrain.plan.world import World


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    engine: Engine
    strategy: AbstractStrategy
    bundle: ModelBundle
    config: Config
    comm: AbstractComm
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter, whole, in the module's order."""

    @property
    def lines(self) -> list[str]:
        """What runs, in words."""
        num = sum(math.prod(shape) for shape in self.shapes.values())
        batch = BatchPlan(self.config.batch.global_batch or 0, int(self.config.batch.micro_batch), self.comm.size)
        return [
            f"{num / 1e6:,.1f} M parameters on {self.comm.size} {self.config.device} ranks, "
            f"{self.config.train.precision}",
            batch.describe(),
        ]

    def export(self, to: Path) -> None:
        """Write the full weights with config and tokenizer. Collective: rank 0 writes, one tensor at a time."""
        tensors = _in_step(self.strategy.full_state(), self.comm)
        if self.comm.rank != 0:
            for _ in tensors:
                pass
            return
        assert self.config.export.dtype != "auto"
        write_export(
            tensors,
            self.shapes,
            to,
            assets=self.bundle.assets,
            dtype=self.config.export.dtype,
            max_shard_bytes=self.config.export.max_shard_gb * 1e9,
            name_of=self.bundle.export_name,
        )


def build(
    config: Config, world: World, comm: AbstractComm, *, assets: Path, rows: tuple[RowStore, RowStore], pad_id: int
) -> Built:
    """`config` is settled: no `auto` is left in it. Collective."""
    assert config.train.precision != "auto", config.train.precision
    assert config.train.steps is not None
    assert config.batch.global_batch is not None
    assert config.batch.micro_batch != "auto"
    assert config.optim.lr != "auto"
    torch.manual_seed(config.run.seed)
    bundle = config.tuning.apply(config.model.build(assets, seed=config.run.seed))
    if config.train.activation_checkpointing:
        for block in bundle.blocks:
            recompute(block)
    shapes = {name: tuple(param.shape) for name, param in bundle.module.named_parameters()}
    optim = Optim(config.optim, config.train.precision, config.train.grad_clip)
    frozen = [name for name, param in bundle.module.named_parameters() if not param.requires_grad]
    if frozen:
        raise DtrainError(f"tuning: strategies load trained parameters only so far, and {frozen[0]} is frozen")
    strategy = config.strategy.build(world, comm, optim)
    strategy.wrap(bundle)
    course = Course(
        steps=config.train.steps,
        lr=config.optim.lr,
        schedule=config.schedule,
        batch=BatchPlan(config.batch.global_batch, config.batch.micro_batch, comm.size),
        seed=config.run.seed,
        pad_id=pad_id,
        eval_every=config.eval.every_steps,
        eval_max_rows=config.eval.max_rows,
        flops_per_token=config.model.figures().flops_per_token(config.dataset.max_length),
        peak_flops=_peak(comm.device, config.train.precision),
    )
    torch.manual_seed(config.run.seed + 1 + comm.rank)  # dropout differs between ranks
    engine = Engine(course, strategy, config.objective.build(), comm, rows)
    return Built(engine, strategy, bundle, config, comm, shapes)


def _peak(device: torch.device, precision: str) -> float | None:
    """The data sheets' peaks are of 16 bits."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def _in_step(tensors: Iterable[tuple[str, torch.Tensor]], comm: AbstractComm) -> Iterator[tuple[str, torch.Tensor]]:
    """All ranks wait for each other at every tensor, so that no wait is longer than the writing of one. Collective."""
    for one in tensors:
        comm.barrier()
        yield one


def recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass, and run it again there (arXiv 1604.06174)."""
    forward = block.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = checkpointed
