"""What `model.attention` may be. No torch here: specs import it."""

from __future__ import annotations

from typing import Literal

Attention = Literal[
    "auto",
    "flash_attention_3",
    "flash_attention_2",
    "varlen",
    "documents",
    "flex_attention",
    "document_scores",
    "sdpa",
    "eager",
]
MASKED: frozenset[Attention] = frozenset({"sdpa", "eager"})
"""Those that make a number for each pair of tokens of a row."""
