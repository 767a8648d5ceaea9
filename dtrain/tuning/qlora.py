from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from dtrain.config.spec import spec
from dtrain.tuning.lora import LoRA

if TYPE_CHECKING:
    from dtrain.config.spec import StrategySpec
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures
    from dtrain.plan.world import Device


@spec
class QLoRA(LoRA):
    """LoRA on linear layers whose weights are kept in 4 bits (arXiv 2305.14314), by bitsandbytes."""

    double_quant: bool = True
    """Keep the scales of the 4-bit blocks in 8 bits: 0.4 bits less for each weight."""

    def problems(self) -> list[str]:
        found = LoRA.problems(self)
        if self.dora or self.init not in ("kaiming", "gaussian", "orthogonal"):
            key = "tuning.dora=true" if self.dora else f"tuning.init={self.init}"
            found.append(f"{key}: changes the weights that are kept in 4 bits, or reads them apart from their layer; "
                         f"use tuning=lora, or leave it out")  # fmt: skip
        return found

    def misfits(self, strategy: StrategySpec, precision: str, device: Device) -> list[str]:
        found = []
        if getattr(strategy, "stage", 0) == 3:
            found.append("tuning=qlora: the 4-bit weights are whole on every rank, and ZeRO-3 would divide nothing but "
                         "what is added; use strategy=zero2, ddp or fsdp2, or tuning=lora")  # fmt: skip
        if importlib.util.find_spec("bitsandbytes") is None:
            found.append("tuning=qlora: bitsandbytes is not installed; pip install 'dtrain[qlora]', or use tuning=lora")
        return found

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from dtrain.tuning._nf4 import Rounded
        from dtrain.tuning._peft import linear_layers, put_in

        shapes = {f"{name}.weight": layer.weight.shape for name, layer in linear_layers(bundle)}
        rounded = Rounded(bundle.weights, shapes, nested=self.double_quant)
        bundle = LoRA.apply(self, dataclasses.replace(bundle, weights=rounded), seed=seed)
        put_in(bundle, rounded, nested=self.double_quant)
        return bundle

    def frozen_bytes(self, figures: Figures, compute_bytes: int) -> float:
        """Half a byte for each weight of a linear layer, and for each block of 64 its scale."""
        f = figures
        inside = f.layers * (f.num_block_params - f.norms * f.hidden)
        scale = 1 + 4 / 256 if self.double_quant else 4
        return inside * (0.5 + scale / 64) + compute_bytes * (f.num_params - inside)

    def divides(self) -> bool:
        return False
