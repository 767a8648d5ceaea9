"""How large what is added to a model will be, from its figures alone. No torch here."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.plan.figures import Figures


def num_added(figures: Figures, targets: Sequence[str], each: Callable[[int, int], int]) -> int:
    """Summed over the linear layers that `targets` name: of their outputs and inputs, named as decoders name them."""
    f = figures
    query, key = f.heads * f.head_dim, f.kv_heads * f.head_dim
    layers = {
        "self_attn.q_proj": (query, f.hidden), "self_attn.k_proj": (key, f.hidden), "self_attn.v_proj": (key, f.hidden),
        "self_attn.o_proj": (f.hidden, query), "mlp.gate_proj": (f.intermediate, f.hidden),
        "mlp.up_proj": (f.intermediate, f.hidden), "mlp.down_proj": (f.hidden, f.intermediate),
    }  # fmt: skip
    total = 0
    for i in range(f.layers):
        for name, (rows, columns) in layers.items():
            full = f"model.layers.{i}.{name}"
            if any(one == "all-linear" or fnmatch.fnmatchcase(full, one) or fnmatch.fnmatchcase(full, f"*.{one}")
                   for one in targets):  # fmt: skip
                total += each(rows, columns)
    return total
