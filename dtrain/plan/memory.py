"""Memory of one rank by formula: training state from the strategy, activations and loss from the model's figures.

An estimate to compare strategies by; peaks of allocators and of fused kernels are not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from dtrain.plan.figures import Figures
from dtrain.plan.world import Device, Topology

CUDA_CONTEXT_BYTES = 2**29
_CHUNK_BYTES: Mapping[Device, int] = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of one chunk's fp32 logits. On a GPU each chunk reads and writes all of the weight gradient: few are better."""
_LEAST_ROWS = 512
"""With fewer targets in a chunk the sum of the weight gradient takes longer than its products (a CPU and 152 k tokens:
4.4 times plain cross-entropy at 28 rows, 1.0 at 512)."""
LOGIT_BYTES = 10
"""Of one logit of a chunk, at the peak: itself, in fp32, and its gradient."""


def chunk_rows(vocab: int, device: Device) -> int:
    """Targets whose logits exist at one time in the loss of a language model."""
    return max(_LEAST_ROWS, _CHUNK_BYTES[device] // (4 * vocab))


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What the training state is made of, whatever the strategy."""

    figures: Figures
    num_trainable: int
    precision: Literal["fp32", "bf16", "fp16"]
    state_bytes: int
    """Optimizer state per trainable parameter, master weights not counted."""
    topology: Topology
    frozen_bytes: float = 0.0
    """Of what is not trained, where it is whole."""
    divided: bool = True
    """Whether that is divided by strategies that divide parameters."""

    def frozen_on_rank(self, over: int) -> float:
        """Its bytes on one of `over` ranks that divide the parameters among them."""
        return self.frozen_bytes / (over if self.divided else 1)

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
    masks: bool = False
    """Whether attention makes a number for each pair of tokens of a row."""


def estimate(need: Need, states: StateBytes, shape: Shape) -> Memory:
    constant = CUDA_CONTEXT_BYTES if shape.device == "cuda" else 0
    return Memory(states, _activations(need, shape), _loss(need, shape), constant)


def _activations(need: Need, shape: Shape) -> float:
    """Tensors that autograd keeps: what transformers' decoder blocks save with torch's own attention, counted operation
    by operation (a test compares with what is saved).
    """
    f, e = need.figures, need.compute_bytes
    if f.blank:
        return 0.0
    tokens = shape.micro_batch * shape.length
    q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
    # A norm keeps its input in fp32, its normalised value and its output.
    norm = 4 + 2 * e
    norms = f.norms * norm * f.hidden + (norm * (q + kv) if f.qk_norms else 0)
    # Query, keys, values, and the output; where there are masks, keys and values are repeated for each head.
    attention = e * (4 * q if shape.masks else 2 * q + 2 * kv)
    # Gate, its activation, up, and their product.
    mlp = e * 4 * f.intermediate
    # Which tokens see each other, as numbers to add to the scores, made in each layer.
    pairs = shape.micro_batch * shape.length**2 if shape.masks else 0
    block = tokens * (norms + attention + mlp) + e * pairs
    ends = tokens * norm * f.hidden + pairs
    if shape.activation_checkpointing:
        return f.layers * tokens * e * f.hidden + block + ends
    return f.layers * block + ends


def _loss(need: Need, shape: Shape) -> float:
    """Projection and cross-entropy a chunk of rows at a time: a chunk's logits, the gradients of projection and hidden
    states.
    """
    f, e = need.figures, need.compute_bytes
    if f.blank:
        return 0.0
    tokens = shape.micro_batch * shape.length
    rows = min(tokens, chunk_rows(f.vocab, shape.device))
    weight_grad = (e if rows == tokens else 4) * f.vocab * f.hidden
    return LOGIT_BYTES * rows * f.vocab + weight_grad + 2 * tokens * f.hidden * e
