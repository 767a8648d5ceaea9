"""A byte-level BPE tokenizer trained on the run's own text; for models that start from nothing. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dtrain.config.compose import group_choice

EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL = (EOS, "<|im_start|>", "<|im_end|>", PAD)
"""Ids 0 to 3, in this order."""
_TEMPLATE = "qwen"
"""The chat template, of those in conf: it has these tokens, and writes tools too."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where words end for Qwen2. transformers gives every model of that type this pattern and NFC, whatever tokenizer.json
says: with others an exported model would read another text than was trained on."""


def sample_texts(texts: Iterable[str], num_chars: int) -> list[str]:
    """At most about `num_chars` of the texts, taken evenly over all of them; the same for the same texts."""
    taken: list[str] = []
    stride, size = 1, 0
    for i, text in enumerate(texts):
        if i % stride:
            continue
        taken.append(text[:num_chars])
        size += len(taken[-1])
        while size > num_chars and len(taken) > 1:
            taken, stride = taken[::2], stride * 2
            size = sum(map(len, taken))
    return taken


def train_tokenizer(texts: Sequence[str], vocab: int, folder: Path, max_positions: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with at most `vocab` tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": group_choice("template", _TEMPLATE)["text"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield from text.splitlines(keepends=True)
