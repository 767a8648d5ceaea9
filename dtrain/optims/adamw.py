from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import OptimSpec, spec

if TYPE_CHECKING:
    import torch
    from torch import nn


@spec
class AdamW(OptimSpec):
    """AdamW (arXiv 1711.05101): weight decay apart from the gradient."""

    state_bytes: ClassVar[int] = 8
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    fresh_lr: ClassVar[float] = 1e-3
    tuning_lr: ClassVar[float] = 2e-5

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; the schedule multiplies it. `auto` is 1e-3 for fresh weights, 2e-5 for trained ones."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """For tensors of two and more dimensions; biases and norms never decay."""

    def build(
        self, named: Iterable[tuple[str, nn.Parameter]], lr_factor: Callable[[str], float] = lambda name: 1.0
    ) -> torch.optim.Optimizer:
        import torch

        assert self.lr != "auto", "the plan settles it"
        alike = groups(named, self.weight_decay, lr_factor)
        return torch.optim.AdamW(alike, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


def groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_factor: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Of what is trained: alike in decay, which is for tensors of two and more dimensions, and in `lr_factor`."""
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in named:
        if not param.requires_grad:
            continue
        decay = weight_decay if _ndim(param) >= 2 else 0.0
        alike.setdefault((lr_factor(name), decay), []).append(param)
    return [{"params": params, "weight_decay": decay, "lr_factor": factor}
            for (factor, decay), params in alike.items()]  # fmt: skip


def _ndim(param: nn.Parameter) -> int:
    # DeepSpeed leaves an empty tensor in place of a partitioned parameter and keeps the shape beside it.
    return len(getattr(param, "ds_shape", param.shape))
