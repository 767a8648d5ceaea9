"""Live fully_shard, with one replica group or several, and loss scaling in fp16."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtrain.errors import PlanError
from dtrain.models.base import DTYPES, ModelBundle
from dtrain.strategies._scale import LossScale
from dtrain.strategies.base import AbstractStrategy, Optim, Shard, Update, set_lr
from dtrain.strategies.shared import clip_factor, fill, make_state, recast_frozen, squared_norm, state_of, updates_of

if TYPE_CHECKING:
    from dtrain.plan.world import World


@final
class _FSDP2(AbstractStrategy):
    def __init__(self, world: World, device: torch.device, optim: Optim, *, replicas: int, reshard: bool) -> None:
        if world.size % replicas:
            raise PlanError(f"strategy.replicas={replicas}: does not divide the {world.size} ranks")
        self._world, self._device, self._optim, self._reshard = world, device, optim, reshard
        shape = (replicas, world.size // replicas)
        mesh = init_device_mesh(world.device, shape, mesh_dim_names=("replicate", "shard"))
        self._mesh = mesh if replicas > 1 else mesh["shard"]
        self._shard_group = mesh["shard"].get_group()
        self._replica, self._replicas = mesh.get_local_rank("replicate"), replicas
        self._scale = LossScale(enabled=optim.precision == "fp16")

    def wrap(self, bundle: ModelBundle) -> None:
        recast_frozen(bundle.module, DTYPES[self._optim.precision])
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self._optim.precision], reduce_dtype=torch.float32)
        for block in bundle.blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=policy, reshard_after_forward=self._reshard)
        root = fully_shard(bundle.module, mesh=self._mesh, mp_policy=policy)
        assert isinstance(root, FSDPModule)
        self._root, self.module = root, bundle.module
        buffers = {name: buffer.to(self._device) for name, buffer in bundle.module.named_buffers()}
        bundle.module.to_empty(device=self._device)
        with torch.no_grad():
            for name, buffer in bundle.module.named_buffers():
                buffer.copy_(buffers[name])
        # The update runs on each rank's own piece as a plain tensor that shares its memory: the same arithmetic
        # without DTensor's dispatch for every operation.
        self._named: dict[str, DTensor] = {}
        self._pieces: dict[str, nn.Parameter] = {}
        for name, param in bundle.module.named_parameters():
            assert isinstance(param, DTensor), name
            self._named[name] = param
            self._pieces[name] = nn.Parameter(param.to_local().detach(), param.requires_grad)
        self._optimizer = self._optim.build(self._pieces.items())
        fill(self.shards(), bundle.weights)
        fill(self.frozen_shards(), bundle.weights)

    def micro(self, *, sync: bool) -> AbstractContextManager[None]:
        # Gradients are divided after every micro-batch: whole ones would be the memory that sharding is to save. What
        # waits for the last one is the sum over the replicas.
        self._root.set_requires_all_reduce(sync)
        self._root.set_is_last_backward(sync)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self._scale.value if self._scale.value != 1.0 else loss).backward()

    def step(self, lr: float) -> Update:
        grads = []
        for name, piece in self._pieces.items():
            grad = self._named[name].grad
            if grad is not None:
                assert isinstance(grad, DTensor)
                piece.grad = grad.to_local()
                grads.append(piece.grad)
        square = squared_norm(grads, self._device)
        dist.all_reduce(square, group=self._shard_group)
        scale = self._scale.value
        norm = float(square.sqrt()) / scale
        if math.isfinite(norm):
            factor = clip_factor(norm, self._optim.grad_clip) / scale
            if factor != 1.0:
                torch._foreach_mul_(grads, factor)
            set_lr(self._optimizer, lr)
            self._optimizer.step()
        skipped = self._scale.update(norm)
        self._optimizer.zero_grad()
        self.module.zero_grad()
        return Update(norm, skipped)

    def shards(self) -> Iterator[Shard]:
        return self._shards(trained=True)

    def frozen_shards(self) -> Iterator[Shard]:
        return self._shards(trained=False)

    def _shards(self, *, trained: bool) -> Iterator[Shard]:
        for name, param in self._named.items():
            piece = self._pieces[name]
            if piece.requires_grad != trained:
                continue
            assert piece.data_ptr() == param.to_local().data_ptr(), f"{name} was moved in memory"
            _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            start = offset[0] * math.prod(param.shape[1:]) if piece.numel() else param.numel()
            views = {"weight": piece.detach().view(-1)}
            with state_of(self._optimizer, piece) as state:
                views |= {key: one.view(-1) for key, one in state.items() if one.shape == piece.shape}
                yield Shard(name, tuple(param.shape), start, views, self._replica, self._replicas)

    def counters(self) -> dict[str, float]:
        return {"updates": updates_of(self._optimizer), **self._scale.counters()}

    def restore(self, counters: Mapping[str, float]) -> None:
        trained = [piece for piece in self._pieces.values() if piece.requires_grad]
        make_state(self._optimizer, trained, self._optim.state_names, int(counters["updates"]))
        self._scale.restore(counters)

    def refresh(self) -> None:
        # Compute weights are cast from the masters when they are gathered; what a forward left gathered is out of date.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_state(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in self._named.items():
            if names is not None and name not in names:
                continue
            full = param.full_tensor()
            yield name, full.detach().float().cpu()
