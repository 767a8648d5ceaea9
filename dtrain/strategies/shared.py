"""What strategies share: from meta to memory, the norm and clipping of gradients, an optimizer's state by its names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from dtrain.models.base import AbstractWeights
from dtrain.optims.packed import AbstractPacked
from dtrain.strategies.base import Shard


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype,
                each: Callable[[nn.Parameter], None] | None = None) -> None:  # fmt: skip
    """Put empty parameters of `dtype` in place of those on meta, and move the buffers, which are real and keep theirs.

    A parameter that is used in several places stays one. `each` sees every parameter when it is made, one at a time.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in made:
                made[old] = nn.Parameter(torch.empty(old.shape, device=device, dtype=dtype), old.requires_grad)
                if each is not None:
                    each(made[old])
            owner._parameters[name] = made[old]
        for name, buffer in list(owner.named_buffers(recurse=False)):
            assert not buffer.is_meta, name
            owner._buffers[name] = buffer.to(device)


def recast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Have parameters on meta that are not trained in `dtype`; what is trained stays fp32."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not old.requires_grad and old.dtype != dtype:
                if old not in made:
                    made[old] = nn.Parameter(torch.empty_like(old, dtype=dtype), requires_grad=False)
                owner._parameters[name] = made[old]


def fill(shards: Iterable[Shard], weights: AbstractWeights) -> None:
    """Read into every shard's `weight` what the model's own files or fresh values say."""
    with torch.no_grad():
        for shard in shards:
            view = shard.views["weight"]
            view.copy_(weights.read(shard.name, shard.start, view.numel()))


def clip_factor(norm: float, most: float) -> float:
    """What gradients of this global norm are multiplied by; as torch and DeepSpeed do, with the same 1e-6."""
    return min(1.0, most / (norm + 1e-6)) if most else 1.0


def squared_norm(grads: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares of all elements, fp32 scalar on `device`."""
    norms = torch._foreach_norm([grad for grad in grads if grad.numel()])
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the optimizer has taken."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


@contextlib.contextmanager
def state_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> Iterator[Mapping[str, torch.Tensor]]:
    """What an optimizer keeps of a parameter, by name; what is written to it is kept when the context ends, if not
    before.
    """
    if isinstance(optimizer, AbstractPacked):
        with optimizer.opened(param) as opened:
            yield opened
    else:
        yield optimizer.state.get(param, {})


def make_state(
    optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor], names: Sequence[str], updates: int
) -> None:
    """State as the optimizer's own after so many updates, of zeros; none before the first, as it has itself. What there
    was before is gone.
    """
    params = list(params)
    for param in params:
        optimizer.state.pop(param, None)
    if not updates:
        return
    if isinstance(optimizer, AbstractPacked):
        for param in params:
            if param.numel():
                optimizer.make(param, names, updates)
        return
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for param in params:
        step = torch.tensor(float(updates), dtype=torch.float32, device=param.device if fused else "cpu")
        optimizer.state[param] = {"step": step, **{name: torch.zeros_like(param.detach()) for name in names}}
