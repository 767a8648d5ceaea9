"""Text from an exported model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from dtrain.errors import ModelError
from dtrain.models.outputs import has_outputs


def generate(
    folder: Path, prompt: str, *, chat: bool, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The prompt, then what the model makes of it, piece by piece. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
    from transformers.utils import logging

    if (folder / "config.json").is_file() and has_outputs(folder):
        raise ModelError(f"{folder}: the model has outputs of its own in place of a vocabulary, so it writes nothing; "
                         f"transformers' AutoModelForSequenceClassification loads it")  # fmt: skip
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers does not load it: {error}") from error
    if chat:
        if not tokenizer.chat_template:
            raise ModelError(f"{folder}: its tokenizer has no chat template; leave --chat out")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = prompt
        yield prompt
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    if not ids.shape[1]:
        raise ModelError("--prompt: it has no tokens; give at least one character")
    model = cast(Any, model)  # its class hides `generate` from type checkers
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(seed)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    work = threading.Thread(
        target=model.generate, daemon=True,
        kwargs={"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device),
                "max_new_tokens": max_new_tokens, "streamer": streamer, **sampling},
    )  # fmt: skip
    work.start()
    yield from streamer
    work.join()
