from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import OptimSpec, spec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.config.spec import StrategySpec
    from dtrain.plan.world import Device


@spec
class AdamW8bit(OptimSpec):
    """AdamW whose moments are kept in 8 bits, in blocks of 256 with a scale each (arXiv 2110.02861), by bitsandbytes.

    Parameters of fewer than 4,096 numbers on a rank keep theirs in 32 bits, as is the library's rule.
    """

    state_bytes: ClassVar[int] = 2
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    fresh_lr: ClassVar[float] = 1e-3
    tuning_lr: ClassVar[float] = 2e-5

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; the schedule multiplies it. `auto` is 1e-3 for fresh weights, 2e-5 for trained ones."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """For tensors of two and more dimensions; biases and norms never decay."""
    paged: bool = False
    """Keep the moments in memory that CUDA moves to the host when the device has no room."""

    def misfits(self, strategy: StrategySpec, device: Device) -> list[str]:
        found = []
        if importlib.util.find_spec("bitsandbytes") is None:
            found.append("optim=adamw8bit: bitsandbytes is not installed; pip install 'dtrain[qlora]', or use "
                         "optim=adamw")  # fmt: skip
        if getattr(strategy, "stage", 0):
            found.append("optim=adamw8bit: DeepSpeed lays parameters end to end and keeps their state in fp32, where "
                         "blocks of 8 bits would run over from one to the next; use strategy=ddp or fsdp2, or "
                         "optim=adamw")  # fmt: skip
        if self.paged and device != "cuda":
            found.append(f"optim.paged=true: it is CUDA that moves pages, and these ranks compute on {device}; leave "
                         f"it out")  # fmt: skip
        return found

    def build(
        self, named: Iterable[tuple[str, nn.Parameter]], lr_factor: Callable[[str], float] = lambda name: 1.0
    ) -> torch.optim.Optimizer:
        from dtrain.optims._adamw8bit import make
        from dtrain.optims.adamw import groups

        assert self.lr != "auto", "the plan settles it"
        return make(groups(named, self.weight_decay, lr_factor), self)
