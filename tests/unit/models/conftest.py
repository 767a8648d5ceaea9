from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch._dynamo  # sets a variable of the environment when first imported: not during a test

from dtrain.models._causal import build_causal

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as deepspeed does, which transformers imports to save a model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def write_config(folder: Path, model_type: str, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, "model_type": model_type, **changes}))
    return folder


def load(bundle, device="cpu"):
    """What a strategy does, in one process: every parameter gets memory and its values; tied ones stay one."""
    module, real = bundle.module, {}
    for name, param in module.named_parameters():
        values = bundle.weights.read(name, 0, param.numel()).float().view(param.shape)
        real[param] = torch.nn.Parameter(values.clone(), requires_grad=param.requires_grad)
    for owner in module.modules():
        for name, param in owner.named_parameters(recurse=False):
            setattr(owner, name, real[param])
    return module


@pytest.fixture
def make(tmp_path):
    """A loaded module, and the same model as transformers has it."""

    def _make(model_type="qwen2", seed=0, attention="auto", **changes):
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = write_config(tmp_path / model_type, model_type, **changes)
        bundle = build_causal(folder, seed=seed, attention=attention, from_scratch=True)
        module = load(bundle)
        peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        peer.load_state_dict({bundle.export_name(k): v for k, v in module.state_dict().items()})
        return bundle, module, peer

    return _make
