"""Which computes the loss: a kernel is taken where it gives what chunks give, and only for what it is made for."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models import _liger
from dtrain.models._head import Head, Logits
from dtrain.models._loss import Kernel, choose
from dtrain.models.base import Setting
from dtrain.models.hf import HF
from dtrain.models.tiny import Tiny
from tests.unit.models.test_attention import Solo

CPU = Setting(torch.device("cpu"), torch.float32, packed=True)


class Plain:
    """A kernel of plain torch, which may be made wrong, and counts its calls."""

    def __init__(self, *, value: float = 1.0, gradient: float = 1.0, backward: bool = True) -> None:
        self.value, self.gradient, self.backward, self.calls = value, gradient, backward, 0

    def __call__(self, hidden, weight, bias, ids, dtype, logits):
        self.calls += 1
        assert len(ids)
        given = logits.apply(nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias).float())
        loss = nn.functional.cross_entropy(given, ids, reduction="sum")
        if not self.backward:
            raise RuntimeError("no such op\nand more")
        return self.value * loss.detach() + self.gradient * (loss - loss.detach())

    def kernel(self, lacks=lambda device, logits: None) -> Kernel:
        return Kernel("liger", lacks, self)


def _head(*, bias: bool = False, logits: Logits | None = None) -> Head:
    torch.manual_seed(0)
    return Head(nn.Linear(24, 50, bias=bias), logits or Logits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [Logits(), Logits(cap=3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kernel_that_gives_the_same_is_taken(dtype, logits, bias):
    head, kernel = _head(bias=bias, logits=logits), Plain()
    before = torch.get_rng_state()
    choice = choose(head, "auto", Setting(CPU.device, dtype, packed=True), Solo(), kernel.kernel())
    assert choice.line == "loss by liger, which gives here what chunks give"
    assert head.fused is kernel
    assert torch.equal(before, torch.get_rng_state()), "a trial draws nothing that the run would miss"


@pytest.mark.parametrize(("made", "why"), [
    (Plain(value=1.01), "its value differs from that of chunks by 1.0e-02"),
    (Plain(gradient=1.1), "its gradient differs from that of chunks by 1.0e-01"),
    (Plain(value=float("nan")), "its value differs from that of chunks by nan"),
    (Plain(backward=False), "RuntimeError: no such op"),
])  # fmt: skip
def test_one_that_does_not_is_passed_over_or_refused(made, why):
    head = _head()
    assert choose(head, "auto", CPU, Solo(), made.kernel()).line == f"loss by chunks, liger: {why}"
    with pytest.raises(ModelError, match="model.loss=liger: .*model.loss=auto takes what works"):
        choose(head, "liger", CPU, Solo(), made.kernel())
    assert head.fused is None


def test_only_what_it_is_made_for_goes_to_it():
    head, kernel = _head(), Plain()
    head.fused = kernel
    hidden, ids = torch.randn(7, 24, requires_grad=True), torch.arange(7)
    head(hidden, ids).backward()
    assert kernel.calls == 1
    head.zero_grad()
    with torch.no_grad():
        head(hidden, ids)
    head(hidden, ids, each=True)
    head(hidden)
    empty = head(hidden[:0], ids[:0])
    empty.backward()
    assert head.weight.grad is not None, "an idle rank is attached to every parameter"
    head.weight.grad = None
    head(hidden.detach(), ids).backward()
    assert float(head.weight.grad.abs().max()) > 0, "a head that is trained alone gets its gradient"
    assert kernel.calls == 1


def test_liger_is_for_cuda():
    assert choose(_head(), "auto", CPU, Solo()).line == "loss by chunks, liger: needs CUDA"
    for spec in (HF(path="a", loss="liger"), Tiny(loss="liger")):
        (said,) = spec.misfits("cpu")
        assert said.startswith("model.loss=liger: a kernel for CUDA, and device=cpu; ")
        assert spec.misfits("cuda") == []
    assert choose(_head(), "chunks", CPU, Solo()).name == "chunks"


@pytest.mark.parametrize(("installed", "logits", "why"), [
    (True, Logits(), None),
    (True, Logits(cap=30.0), None),
    (True, Logits(scale=0.5), "scales no logits"),
    (False, Logits(), "liger-kernel is not installed"),
    (False, Logits(scale=0.5), "scales no logits"),
])  # fmt: skip
def test_what_liger_lacks_on_cuda(installed, logits, why, monkeypatch):
    made = ModuleType("liger_kernel")
    made.__spec__ = ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", made if installed else None)
    assert _liger.lacks(torch.device("cuda"), logits) == why
