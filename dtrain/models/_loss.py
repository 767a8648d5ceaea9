"""What computes the loss of a training: dtrain's chunks, or a kernel that gives the same where it is tried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from dtrain.comm import AbstractComm
from dtrain.errors import ModelError
from dtrain.models import _liger
from dtrain.models._head import Fused, Head, Logits
from dtrain.models.attention.choose import first_reason
from dtrain.models.base import LossKernel, Setting
from dtrain.models.loss import Loss

_ROWS, _MOST_HIDDEN = 48, 128
_VALUE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative, of a gradient to its largest element: a few roundings of the products' precision."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    name: Loss
    lacks: Callable[[torch.device, Logits], str | None]
    """Why it cannot do this here, as far as can be told without trying; None where it may."""
    fused: Fused


LIGER = Kernel("liger", _liger.lacks, _liger.cross_entropy)


def choose(head: Head, name: Loss, setting: Setting, comm: AbstractComm, kernel: Kernel = LIGER) -> LossKernel:
    """Have `head` compute the loss by `name`, or by the kernel where it passes and `name` is auto. Raises ModelError.
    Collective: what one rank cannot do, none does.
    """
    if name == "chunks":
        return LossKernel("chunks", "as model.loss says")
    why = kernel.lacks(setting.device, head.logits)
    why = first_reason(why if why is not None else fault(kernel, head, setting), comm)
    if why is None:
        head.fused = kernel.fused
        return LossKernel(kernel.name, "which gives here what chunks give")
    if name != "auto":
        raise ModelError(f"model.loss={name}: {why}; model.loss=auto takes what works")
    return LossKernel("chunks", f"{kernel.name}: {why}")


def fault(kernel: Kernel, head: Head, setting: Setting) -> str | None:
    """How it differs from chunks on a few random numbers, with as many tokens as the vocabulary has."""
    vocab, width = head.weight.shape[0], min(head.weight.shape[1], _MOST_HIDDEN)
    draw = torch.Generator(setting.device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=setting.device, generator=draw).to(setting.dtype)

    # Without its own start, which would draw from the run's generators.
    linear = nn.utils.skip_init(nn.Linear, width, vocab, bias=head.bias is not None, device=setting.device,
                                dtype=setting.dtype)  # fmt: skip
    with torch.no_grad():
        for param in linear.parameters():
            param.copy_(drawn(*param.shape) / width**0.5)
    hidden = drawn(_ROWS, width).requires_grad_()
    ids = torch.randint(vocab, (_ROWS,), device=setting.device, generator=draw)
    wanted = [hidden, *linear.parameters()]
    found = []
    for fused in (None, kernel.fused):
        trial = Head(linear, head.logits, rows=_ROWS // 2)
        trial.fused = fused
        try:
            loss = trial(hidden, ids)
            # What a step multiplies a loss by has to come out of the backward pass.
            found.append([loss.detach(), *torch.autograd.grad(loss * 0.25, wanted)])
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, there is another way
            first = (str(error).strip().splitlines() or [""])[0]
            return f"{type(error).__name__}: {first[:200]}"
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        far = float((a.float() - b.float()).abs().max() / a.float().abs().max())
        what = "gradient" if i else "value"
        if not far <= (_GRADIENT if i else _VALUE)[setting.dtype]:
            return f"its {what} differs from that of chunks by {far:.1e}"
    return None
