"""Memory of one rank by formula: training state from the strategy, activations and loss from the model's figures.

An estimate to compare strategies by; peaks of allocators and of fused kernels are not in it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dtrain.plan.figures import Figures
from dtrain.plan.world import Device, Topology

CUDA_CONTEXT_BYTES = 2**29
LOSS_CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What the training state is made of, whatever the strategy."""

    figures: Figures
    num_trainable: int
    precision: Literal["fp32", "bf16", "fp16"]
    state_bytes: int
    """Optimizer state per trainable parameter, master weights not counted."""
    topology: Topology

    @property
    def compute_bytes(self) -> int:
        """Of one element in forward and backward."""
        return 4 if self.precision == "fp32" else 2


@dataclasses.dataclass(frozen=True, slots=True)
class StateBytes:
    """Training state of one rank, in bytes."""

    params: float
    grads: float
    optim: float
    """Optimizer state and, where they are apart from the parameters, master weights."""
    gathered: float
    """Parameters that are whole on the device for a while: the unit in use and the one fetched ahead."""
    host: float = 0.0
    """Offloaded to the node's memory or disk, not on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    states: StateBytes
    activations: float
    loss: float
    constant: float

    @property
    def total(self) -> float:
        return (self.states.params + self.states.grads + self.states.optim + self.states.gathered
                + self.activations + self.loss + self.constant)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of one forward."""

    micro_batch: int
    length: int
    activation_checkpointing: bool
    device: Device


def estimate(need: Need, states: StateBytes, shape: Shape) -> Memory:
    tokens = shape.micro_batch * shape.length
    constant = CUDA_CONTEXT_BYTES if shape.device == "cuda" else 0
    return Memory(states, _activations(need, shape), _loss(need, tokens), constant)


def _activations(need: Need, shape: Shape) -> float:
    """Tensors that autograd keeps: what transformers' decoder blocks save, counted operation by operation."""
    f, e = need.figures, need.compute_bytes
    tokens = shape.micro_batch * shape.length
    q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
    # A norm keeps its input and its normalised value in fp32, and its output; there are two.
    norms = 2 * (8 + e) * f.hidden
    # Query: projected, two rotary products, rotated, attention output twice, and keys and values repeated per head.
    attention = e * (8 * q + 4 * kv)
    # Gate, its activation, up, and their product.
    mlp = e * 4 * f.intermediate
    block = tokens * (norms + attention + mlp)
    mask = shape.micro_batch * shape.length**2
    if shape.activation_checkpointing:
        return f.layers * tokens * e * f.hidden + block + mask
    return f.layers * block + mask


def _loss(need: Need, tokens: int) -> float:
    """Chunked projection and cross-entropy: two chunks of fp32 logits, the projection's gradient, hidden states."""
    f = need.figures
    chunk = min(LOSS_CHUNK_BYTES, tokens * f.vocab * 4)
    return 2 * chunk + 4 * f.vocab * f.hidden + 2 * tokens * f.hidden * need.compute_bytes
