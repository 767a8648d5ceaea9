"""A model on disk that says something, with a tokenizer and a chat template; and an adapter for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dtrain.models.assets import files_digest
from tests.unit.data.fakes import CHATML, write_tokenizer

VOCAB, POSITIONS = 300, 96


def write_model(folder: Path, *, template: str | None = CHATML, seed: int = 0) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=POSITIONS, tie_word_embeddings=True, initializer_range=0.3,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


PLACES = 3
"""Before every document, with an adapter of a prompt method."""


def write_adapter(folder: Path, base: Path, *, path: str | None, digest: str | None, kind: str = "lora",
                  seed: int = 1, start: Path | None = None) -> Path:  # fmt: skip
    """As an export of `tuning=<kind>` is, with something learned in it: lora, prompt, ptuning or prefix. `start`: the
    adapter that its losses compared with.
    """
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    prompts = {"prompt": PromptTuningConfig, "ptuning": PromptEncoderConfig, "prefix": PrefixTuningConfig}
    config = (prompts[kind](num_virtual_tokens=PLACES, task_type="CAUSAL_LM") if kind in prompts
              else LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or "prompt_encoder" in name:
                param.normal_(std=0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "generation_config.json").unlink()
    said = {"path": path, "revision": None, "xxh3": digest, "adapter": True}
    said |= {"start": None if start is None else {"path": str(start), "xxh3": files_digest(start)}}
    (folder / "base.json").write_text(json.dumps(said))
    return folder
