"""The head against the plain way: whole logits, then torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.models._head import Head, Logits
from dtrain.plan.memory import chunk_rows

H, V, N = 24, 50, 37


def _case(*, bias=False, dtype=torch.float32, n=N, logits=None, rows=8):
    torch.manual_seed(0)
    linear = nn.Linear(H, V, bias=bias, dtype=dtype)
    head = Head(linear, logits or Logits(), rows=rows)
    hidden = (3 * torch.randn(n, H)).to(dtype).requires_grad_()
    return linear, head, hidden, torch.randint(0, V, (n,))


def _plain(linear, logits, hidden, ids):
    return nn.functional.cross_entropy(logits.apply(linear(hidden).float()), ids, reduction="sum")


def _grads(loss, *tensors):
    return torch.autograd.grad(loss * 0.25, tensors)


def _plain_each(linear, logits, hidden, ids):
    return logits.apply(linear(hidden).float()).log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("rows", [1, 8, 37, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits", [Logits(), Logits(scale=0.125), Logits(scale=2.0, cap=3.0)])
def test_the_log_probability_of_each_target_and_its_gradients_are_the_plain_ones(rows, bias, logits):
    linear, head, hidden, ids = _case(bias=bias, logits=logits, rows=rows)
    tensors = [hidden, *linear.parameters()]
    want, got = _plain_each(linear, logits, hidden, ids), head(hidden, ids, each=True)
    assert (got.shape, got.dtype) == ((N,), torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weigh = torch.randn(N)
    for g, w in zip(torch.autograd.grad(got, tensors, weigh), torch.autograd.grad(want, tensors, weigh), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("rows", [1, 8, 37, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits", [Logits(), Logits(scale=0.125), Logits(scale=2.0, cap=3.0)])
def test_value_and_gradients_are_those_of_plain_cross_entropy(rows, bias, logits):
    linear, head, hidden, ids = _case(bias=bias, logits=logits, rows=rows)
    tensors = [hidden, *linear.parameters()]
    want, got = _plain(linear, logits, hidden, ids), head(hidden, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for g, w in zip(_grads(got, *tensors), _grads(want, *tensors), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("each", [False, True])
def test_bf16_is_as_close_to_fp32_as_plain_bf16_is(each):
    linear, head, hidden, ids = _case(dtype=torch.bfloat16, n=400)
    tensors = [hidden, linear.weight]
    exact_linear = nn.Linear(H, V, bias=False)
    exact_linear.weight.data.copy_(linear.weight.float())
    exact_hidden = hidden.detach().float().requires_grad_()
    exact = _grads(_plain(exact_linear, Logits(), exact_hidden, ids), exact_hidden, exact_linear.weight)
    plain = _grads(_plain(linear, Logits(), hidden, ids), *tensors)
    ours = _grads(-head(hidden, ids, each=True).sum() if each else head(hidden, ids), *tensors)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == torch.bfloat16
        assert (o.float() - e).norm() < 1.25 * (p.float() - e).norm()


def test_autocast_computes_in_its_dtype_and_gives_fp32_gradients():
    linear, head, hidden, ids = _case(n=100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = head(hidden, ids), _plain(linear, Logits(), hidden, ids)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    weight_grad = torch.autograd.grad(got, linear.weight)[0]
    assert weight_grad.dtype == torch.float32
    exact = torch.autograd.grad(_plain(linear, Logits(), hidden, ids), linear.weight)[0]
    assert (weight_grad - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("each", [False, True])
def test_no_target_gives_zero_that_is_still_attached(each):
    linear, head, hidden, ids = _case(bias=True, n=0)
    loss = head(hidden, ids, each=each).sum()
    assert loss.item() == 0.0
    loss.backward()
    assert hidden.grad.shape == (0, H)
    assert [p.grad.count_nonzero().item() for p in linear.parameters()] == [0, 0]


@pytest.mark.parametrize("each", [False, True])
def test_a_frozen_weight_costs_no_gradient(each):
    linear, head, hidden, ids = _case()
    linear.weight.requires_grad_(False)
    want = _grads(_plain(linear, Logits(), hidden, ids), hidden)[0]
    with _Largest() as seen:
        (-head(hidden, ids, each=True).sum() if each else head(hidden, ids)).mul(0.25).backward()
    assert linear.weight.grad is None
    assert (V, H) not in seen.shapes
    torch.testing.assert_close(hidden.grad, want)


def test_without_grad_only_the_loss_is_computed():
    linear, head, hidden, ids = _case()
    with torch.no_grad(), _Largest() as seen:
        loss = head(hidden, ids)
    torch.testing.assert_close(loss, _plain(linear, Logits(), hidden, ids).detach())
    assert (V, H) not in seen.shapes
    assert (N, H) not in seen.shapes


@pytest.mark.parametrize("each", [False, True])
def test_the_logits_of_all_targets_never_exist(each):
    _, head, hidden, ids = _case(n=400, rows=8)
    with _Largest() as seen:
        head(hidden, ids, each=each).sum().backward()
    # The weight gradient [50, 24] and the hidden gradient [400, 24] are needed; logits come 8 x 50 at a time.
    assert {shape for shape in seen.shapes if V in shape and 400 in shape} == set()
    assert seen.numel == 400 * H


def test_one_loss_is_differentiated_once():
    _, head, hidden, ids = _case()
    loss = head(hidden, ids)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="twice"):
        loss.backward()


def test_rows_of_a_chunk():
    assert chunk_rows(4096, "cpu") == 4096  # 64 MiB / (4 bytes * 4096)
    assert chunk_rows(152064, "cpu") == 512  # 110 would fit, and be slow
    assert chunk_rows(152064, "cuda") == 882  # 512 MiB / (4 bytes * 152064)


def test_a_large_weight_gradient_is_summed_by_parts(monkeypatch):
    monkeypatch.setattr("dtrain.models._head._PRODUCT_BYTES", 2 * H * 7)  # 7 of 50 tokens at a time
    linear, head, hidden, ids = _case(dtype=torch.bfloat16, n=100)
    want = _grads(_plain(linear, Logits(), hidden, ids), linear.weight)[0]
    got = _grads(head(hidden, ids), linear.weight)[0]
    assert (got - want).norm() < 0.01 * want.norm()


class _Largest(TorchDispatchMode):
    """Every tensor that an operation gives while this is on."""

    def __enter__(self):
        self.shapes, self.numel = set(), 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            is_view = func.is_view or func.overloadpacket is torch.ops.aten.detach
            if isinstance(tensor, torch.Tensor) and not is_view:
                self.shapes.add(tuple(tensor.shape))
                self.numel = max(self.numel, tensor.numel())
        return out
