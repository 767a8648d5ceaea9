"""Liger's projection with its cross-entropy; the sole importer of liger_kernel in a training."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dtrain.models._head import Logits


def lacks(device: torch.device, logits: Logits) -> str | None:
    """Why it cannot do this here, as far as can be told without trying; None where it may."""
    if device.type != "cuda":
        return "needs CUDA"
    if logits.scale != 1.0:  # before what could be installed, which would not help
        return "scales no logits"
    return None if importlib.util.find_spec("liger_kernel") is not None else "liger-kernel is not installed"


def cross_entropy(
    hidden_NH: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target_ids: torch.Tensor,
    dtype: torch.dtype,
    logits: Logits,
) -> torch.Tensor:
    """The sum over targets, in fp32, of which there is at least one; products in `dtype`, summed over chunks in fp32.
    Attached to the parameters only where the hidden states ask for a gradient.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    with torch.autocast(hidden_NH.device.type, enabled=False):
        total: torch.Tensor = liger_fused_linear_cross_entropy(
            hidden_NH.to(dtype), weight.to(dtype), target_ids, None if bias is None else bias.to(dtype),
            reduction="sum", softcap=logits.cap, accum_dtype=torch.float32,
        )  # fmt: skip
    return total
