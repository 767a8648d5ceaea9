"""Whether a merged model says what the model with its adapter says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtrain.checkpoint.export import write_export
from dtrain.errors import ModelError
from dtrain.tuning._peft import load

if TYPE_CHECKING:
    from dtrain.checkpoint.tuned import Parts

PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Question: what is 12 + 30?\nAnswer:")


def compare(base: Path, adapter: Parts, merged: Path) -> str:
    """The largest difference of a logit over a few prompts, in a line; both models are loaded, one after the other.

    `base`: the folder of the model that was tuned. Raises ModelError.
    """
    if not any(base.glob("*.safetensors")):
        return "merged: not compared: the model that was tuned has no files, its weights were made from a seed"
    (shapes, tensors), said = adapter
    assert said is not None
    with tempfile.TemporaryDirectory(prefix="dtrain-adapter-") as folder:
        to = Path(folder) / "adapter"
        write_export(tensors, shapes, to, assets=merged, dtype="fp32", max_shard_bytes=0, adapter=said)
        before = _logits(base, merged, to)
    after = _logits(merged, merged, None)
    largest = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
    scale = max(float(one.abs().max()) for one in before)
    return (f"merged: over {len(PROMPTS)} prompts no logit differs by more than {largest:.3g}, where the largest is "
            f"{scale:.3g}")  # fmt: skip


def _logits(folder: Path, tokenizer: Path, adapter: Path | None) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        words: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers does not load it: {error}") from error
    if adapter is not None:
        model = load(model, adapter)
    model.eval()
    with torch.no_grad():
        return [model(input_ids=words(prompt, return_tensors="pt").input_ids).logits for prompt in PROMPTS]
