"""A model's architecture in numbers, so that a plan needs neither the weights nor torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dtrain.errors import ModelError

_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    """What the config.json of a model type leaves unsaid."""

    qkv_bias: bool = False
    out_bias: bool = False
    """Whether `attention_bias` adds a bias to the output projection as well; False where it adds none at all."""
    mlp_bias: bool = False
    norms: int = 2
    """Per block, of the hidden size."""
    qk_norms: bool = False
    tied: bool = False
    """Where `tie_word_embeddings` is not given."""
    head_dim_needed: bool = False
    """Whether head_dim may differ from hidden / heads, so that the config has to give it."""


_FAMILIES = {
    "llama": _Family(out_bias=True, mlp_bias=True),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(out_bias=True, qk_norms=True, head_dim_needed=True),
    "gemma": _Family(out_bias=True, tied=True, head_dim_needed=True),
    "gemma2": _Family(out_bias=True, norms=4, tied=True, head_dim_needed=True),
    "gemma3_text": _Family(out_bias=True, norms=4, qk_norms=True, tied=True, head_dim_needed=True),
}


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
    norms: int = 2
    """Of a layer, of the hidden size."""
    qk_norms: bool = False
    """Whether queries and keys are normalised."""
    estimate: bool = False
    """Whether the counts are those of a Llama of this size, since the model type is not one that we know."""

    blank: bool = False
    """Whether only the counts of parameters say something: of a network that is no language model."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Figures:
        """From the keys of a `config.json`; exact for the families above. Raises ModelError."""
        kind = str(config.get("model_type", ""))
        family = _FAMILIES.get(kind, _FAMILIES["llama"])
        required = (*_REQUIRED, "head_dim") if family.head_dim_needed else _REQUIRED
        missing = [key for key in required if config.get(key) is None]
        if missing:
            raise ModelError(f"the architecture of model_type {kind or 'unknown'!r} lacks {', '.join(missing)}: give "
                             f"these keys as in the model's config.json")  # fmt: skip
        hidden, layers, heads, intermediate, vocab, max_positions = (int(config[key]) for key in _REQUIRED)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        given = config.get("tie_word_embeddings")
        tied = family.tied if given is None else bool(given)
        block = _block_params(config, family, hidden, heads * head_dim, kv_heads * head_dim)
        return cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=vocab,
            tied=tied,
            max_positions=max_positions,
            num_params=layers * block + hidden + vocab * hidden * (1 if tied else 2),
            num_block_params=block,
            norms=family.norms,
            qk_norms=family.qk_norms,
            estimate=kind not in _FAMILIES,
        )

    def flops_per_token(self, length: int, num_trained: int | None = None) -> float:
        """Model FLOPs of forward and backward for one token in a row of `length`: 6 N + 12 L d s, counting full
        attention and no recomputation (PaLM, arXiv 2204.02311, appendix B; d is heads x head_dim). A third of the 6 are
        gradients of weights, which only those that are trained have.
        """
        trained = self.num_params if num_trained is None else num_trained
        return 4.0 * self.num_params + 2.0 * trained + 12.0 * self.layers * self.heads * self.head_dim * length


def _block_params(config: Mapping[str, Any], family: _Family, hidden: int, query: int, key: int) -> int:
    """Of one layer, whose query is `query` wide over all heads, and whose key and value are `key` wide each."""
    intermediate = int(config["intermediate_size"])
    num = 2 * hidden * query + 2 * hidden * key + 3 * hidden * intermediate + family.norms * hidden
    biased = family.out_bias and bool(config.get("attention_bias"))
    if family.qkv_bias or biased:
        num += query + 2 * key
    if biased:
        num += hidden
    if family.mlp_bias and config.get("mlp_bias"):
        num += 2 * intermediate + hidden
    if family.qk_norms:
        head_dim = query // int(config["num_attention_heads"])
        num += 2 * head_dim
    return num
