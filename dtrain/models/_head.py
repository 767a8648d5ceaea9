"""The output projection and its cross-entropy as one step, so that the logits of a whole batch never exist.

The forward takes the targets a chunk at a time and computes, besides the loss, the gradients of that chunk: they need
nothing that comes later, since the loss is a sum. What the backward does is a multiplication by one number.

An objective that weighs targets by what it finds needs the log-probability of each. Their gradients wait for the
backward, which computes the logits of each chunk once more.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import nn

from dtrain.plan.memory import chunk_rows

_PRODUCT_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Logits:
    """What a model does between projection and softmax: `cap * tanh(scale * x / cap)`, or `scale * x` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


class Fused(Protocol):
    def __call__(
        self,
        hidden_NH: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        dtype: torch.dtype,
        logits: Logits,
    ) -> torch.Tensor:
        """The sum of the cross-entropy of one target or more, in fp32, with products in `dtype`; attached to the
        hidden states, which ask for a gradient, and to the parameters that do.
        """


class Head(nn.Module):
    """The output projection of `linear`, under the same parameter names; gives a loss in place of logits.

    Call it once per forward: strategies gather its parameters around the call. What it gives is attached to the hidden
    states and the parameters, with no target too.
    """

    def __init__(self, linear: nn.Linear, logits: Logits, *, rows: int | None = None) -> None:
        """`rows`: targets per chunk, where the default should not do."""
        super().__init__()
        self.weight: torch.Tensor = linear.weight
        self.bias: torch.Tensor | None = linear.bias
        self.logits = logits
        self.rows = rows
        self.fused: Fused | None = None
        """Takes the place of the chunks in training."""

    def forward(
        self, hidden_NH: torch.Tensor, target_ids: torch.Tensor | None = None, *, each: bool = False
    ) -> torch.Tensor:
        """The sum over targets of the cross-entropy; with `each`, the log-probability of every target, [N]. In fp32.
        Without targets the likeliest token at each place, [N] int64.
        """
        kind = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
        rows = self.rows or chunk_rows(self.weight.shape[0], "cpu" if kind == "cpu" else "cuda")
        how = _How(logits=self.logits, dtype=dtype, rows=rows, train=torch.is_grad_enabled())
        if target_ids is None:
            return _likeliest(hidden_NH, self.weight, self.bias, how)
        # A kernel may leave out the gradients of the parameters where the hidden states need none, and an idle rank
        # has no target to give it.
        if self.fused is not None and not each and how.train and hidden_NH.requires_grad and len(target_ids):
            return self.fused(hidden_NH, self.weight, self.bias, target_ids, dtype, self.logits)
        function = _ChunkedLogProbs if each else _ChunkedCrossEntropy
        return function.apply(hidden_NH, self.weight, self.bias, target_ids, how)


@dataclasses.dataclass(frozen=True, slots=True)
class _How:
    logits: Logits
    dtype: torch.dtype
    """Of the matrix products; the softmax is fp32."""
    rows: int
    """Targets per chunk."""
    train: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        how: _How,
    ) -> torch.Tensor:
        wanted = [how.train and need for need in ctx.needs_input_grad[:3]]
        grads = _Grads.zeros(hidden, weight, bias, wanted, how)
        losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(how.dtype)
            for start in range(0, len(targets), how.rows):
                part = slice(start, start + how.rows)
                x, ids = hidden[part].to(how.dtype), targets[part]
                raw, log_probs = _of_vocabulary(x, compute_weight, bias, how)
                losses[part] = -log_probs.gather(1, ids[:, None])[:, 0]
                if any(wanted):
                    grads.add(part, x, compute_weight, _grad_raw(log_probs, ids, raw, how.logits).to(how.dtype))
                del raw, log_probs
        ctx.grads = (grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.grads is not None, "the loss of one forward was differentiated twice"
        # In place: the weight gradient of a large vocabulary is the largest tensor of the step.
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        hidden, weight, bias = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in pairs)
        ctx.grads = None
        return hidden, weight, bias, None, None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        how: _How,
    ) -> torch.Tensor:
        found = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(how.dtype)
            for start in range(0, len(targets), how.rows):
                part = slice(start, start + how.rows)
                log_probs = _of_vocabulary(hidden[part].to(how.dtype), compute_weight, bias, how)[1]
                found[part] = log_probs.gather(1, targets[part, None])[:, 0]
                del log_probs
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.how = how
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        how = ctx.how
        grads = _Grads.zeros(hidden, weight, bias, ctx.needs_input_grad[:3], how)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(how.dtype)
            for start in range(0, len(targets), how.rows):
                part = slice(start, start + how.rows)
                x, ids = hidden[part].to(how.dtype), targets[part]
                raw, log_probs = _of_vocabulary(x, compute_weight, bias, how)
                # That of the cross-entropy, which is minus what was asked for.
                of_raw = _grad_raw(log_probs, ids, raw, how.logits).mul_(-grad_N[part, None])
                grads.add(part, x, compute_weight, of_raw.to(how.dtype))
                del raw, log_probs, of_raw
        pairs = ((grads.hidden, hidden), (grads.weight, weight), (grads.bias, bias))
        return *(None if grad is None else grad.to(of.dtype) for grad, of in pairs), None, None


def _likeliest(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _How) -> torch.Tensor:
    found = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        compute_weight = weight.to(how.dtype)
        for start in range(0, len(hidden), how.rows):
            part = slice(start, start + how.rows)
            found[part] = _of_vocabulary(hidden[part].to(how.dtype), compute_weight, bias, how)[1].argmax(-1)
    return found


def _of_vocabulary(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _How
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a chunk: what the projection gives, and the log-probabilities of all tokens in fp32."""
    raw = x @ weight.t()
    if bias is not None:
        raw += bias.to(how.dtype)
    return raw, torch.log_softmax(how.logits.apply(raw.float()), dim=-1)


def _grad_raw(log_probs: torch.Tensor, ids: torch.Tensor, raw: torch.Tensor, logits: Logits) -> torch.Tensor:
    """The gradient of a chunk's loss by what the projection gave; reuses the memory of `log_probs`."""
    grad = log_probs.exp_()
    grad.scatter_add_(1, ids[:, None], grad.new_full((len(ids), 1), -1.0))
    if logits.cap is not None:
        tanh = torch.tanh(raw.float() * (logits.scale / logits.cap))
        grad *= 1.0 - tanh.square_()
    if logits.scale != 1.0:
        grad *= logits.scale
    return grad


@dataclasses.dataclass(slots=True)
class _Grads:
    """The gradients so far; None for what is frozen."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def zeros(
        cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: list[bool], how: _How
    ) -> _Grads:
        # One chunk needs no sum over chunks, and its product has been summed in fp32 already.
        total = torch.float32 if len(hidden) > how.rows else how.dtype
        return cls(
            hidden=torch.empty_like(hidden) if wanted[0] else None,
            weight=torch.zeros_like(weight, dtype=total) if wanted[1] else None,
            bias=torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None,
        )

    def add(self, part: slice, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> None:
        if self.hidden is not None:
            self.hidden[part] = grad @ weight
        if self.weight is not None and self.weight.dtype == grad.dtype:
            self.weight.addmm_(grad.t(), x)
        elif self.weight is not None:
            # By parts, since the product in the compute dtype would be as large as the weight.
            step = max(1, _PRODUCT_BYTES // (grad.element_size() * x.shape[1]))
            for start in range(0, len(self.weight), step):
                part_of_vocab = slice(start, start + step)
                self.weight[part_of_vocab] += grad[:, part_of_vocab].t() @ x
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=torch.float32)
