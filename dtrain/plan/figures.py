"""A model's architecture in numbers, so that a plan needs neither the weights nor torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """Of a decoder-only language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """Whether the output projection is the embedding."""
    max_positions: int
    num_params: int
    """All of them; tied ones once."""
    num_block_params: int
    """Of one layer."""

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of forward and backward for one token in a row of `length`: 6 N + 12 L d s, counting full
        attention and no recomputation (PaLM, arXiv 2204.02311, appendix B; d is heads x head_dim).
        """
        return 6.0 * self.num_params + 12.0 * self.layers * self.heads * self.head_dim * length
