"""Live data parallelism in fp32: torch's DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from dtrain.models.base import ModelBundle
from dtrain.strategies.base import AbstractStrategy, Optim, Shard, Update, set_lr
from dtrain.strategies.shared import clip_factor, fill, make_state, materialise, squared_norm, state_of, updates_of

if TYPE_CHECKING:
    from dtrain.plan.world import World
    from dtrain.strategies.ddp import DDP


@final
class _DDP(AbstractStrategy):
    def __init__(self, spec: DDP, world: World, device: torch.device, optim: Optim) -> None:
        assert optim.precision == "fp32"
        self._spec, self._world, self._device, self._optim = spec, world, device, optim

    def wrap(self, bundle: ModelBundle) -> None:
        materialise(bundle.module, self._device, torch.float32)
        self._named = dict(bundle.module.named_parameters())
        self._optimizer = self._optim.build(self._named.items())
        fill(self.shards(), bundle.weights)
        fill(self.frozen_shards(), bundle.weights)
        self.module = bundle.module
        if self._world.size > 1:
            self.module = nn.parallel.DistributedDataParallel(
                bundle.module, device_ids=[self._device] if self._device.type == "cuda" else None,
                bucket_cap_mb=self._spec.bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False,
            )  # fmt: skip
            self._settle_buckets(bundle.module)

    def _settle_buckets(self, module: nn.Module) -> None:
        """Have torch put every gradient into the bucket where it stays. Collective: one reduction of zeros.

        Torch begins with one bucket for all, and divides it anew by the order in which the first backward pass brought
        the gradients. Where a gradient lies in its bucket decides in which order three and more ranks are summed, so
        the first step after a resume would be rounded differently from the same step of a run that was not interrupted.
        """
        # What is added last has its backward first: so the last layer comes first, as it does in training, and vectors,
        # which are small, at the end. Norms are listed after the weights that they come before, and a bucket waits for
        # all that is in it.
        order = sorted((p for p in module.parameters() if p.requires_grad), key=lambda p: p.ndim > 1)

        def touch() -> torch.Tensor:
            total = torch.zeros((), device=self._device)
            for param in order:
                total = total + param.sum() * 0.0
            return total

        forward = module.forward
        module.forward = touch
        try:
            self.module().backward()
        finally:
            module.forward = forward

    def micro(self, *, sync: bool) -> AbstractContextManager[None]:
        if sync or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return nullcontext()
        # no_sync must also cover forward: it decides there whether to arm the reducer.
        return self.module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Update:
        grads = [p.grad for p in self._named.values() if p.grad is not None]
        norm = float(squared_norm(grads, self._device).sqrt())
        if math.isfinite(norm):
            if (factor := clip_factor(norm, self._optim.grad_clip)) < 1.0:
                torch._foreach_mul_(grads, factor)
            set_lr(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=self._world.size == 1)
        return Update(norm)

    def shards(self) -> Iterator[Shard]:
        for name, param in self._named.items():
            if param.requires_grad:
                views = {"weight": param.detach().view(-1)}
                with state_of(self._optimizer, param) as state:
                    views |= {key: one.view(-1) for key, one in state.items() if one.shape == param.shape}
                    yield Shard(name, tuple(param.shape), 0, views, self._world.rank, self._world.size)

    def frozen_shards(self) -> Iterator[Shard]:
        for name, param in self._named.items():
            if not param.requires_grad:
                yield Shard(name, tuple(param.shape), 0, {"weight": param.detach().view(-1)})

    def counters(self) -> dict[str, float]:
        return {"updates": updates_of(self._optimizer)}

    def restore(self, counters: Mapping[str, float]) -> None:
        trained = [param for param in self._named.values() if param.requires_grad]
        make_state(self._optimizer, trained, self._optim.state_names, int(counters["updates"]))

    def refresh(self) -> None:
        """Nothing: the parameters are the masters."""

    def full_state(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in self._named.items():
            if names is not None and name not in names:
                continue
            yield name, param.detach().cpu()
