from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dtrain.errors import ModelError
from dtrain.models.hf import HF
from dtrain.plan.figures import Figures

PRESETS = sorted(path for path in Path("conf/model").glob("*.yaml") if "architecture:" in path.read_text())
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 60, "max_position_embeddings": 64}  # fmt: skip


def _count(config: dict) -> tuple[int, int]:
    """Parameters of the whole model and of one layer, as transformers makes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.for_model(**{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **config})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    layer = model.base_model.layers[0]
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("tied", [None, False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_counts_are_those_of_transformers(kind, bias, tied):
    config = {**SMALL, "model_type": kind}
    if bias:
        config |= {"attention_bias": True} | ({"mlp_bias": True} if kind == "llama" else {})
    if tied is not None:
        config["tie_word_embeddings"] = tied
    figures = Figures.from_hf(config)
    assert (figures.num_params, figures.num_block_params) == _count(config)
    assert not figures.estimate


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_published_sizes(path):
    text = path.read_text()
    published = int(re.match(r"# .*: ([\d,]+) parameters\n", text)[1].replace(",", ""))
    values = yaml.safe_load(text)
    spec = HF(**{key: value for key, value in values.items() if key != "_target_"})
    assert spec.problems() == []
    figures = spec.figures()
    assert figures.num_params == published
    # and with transformers, at two layers: quick, and linear in the layers
    short = {**spec.architecture, "num_hidden_layers": 2}
    assert _count(short) == (published - (figures.layers - 2) * figures.num_block_params, figures.num_block_params)


def test_defaults_of_what_config_json_leaves_out():
    config = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
    figures = Figures.from_hf({**config, "model_type": "llama"})
    assert (figures.kv_heads, figures.head_dim, figures.tied) == (4, 8, False)


def test_missing_keys_are_named():
    with pytest.raises(ModelError, match="'qwen3' lacks vocab_size, head_dim"):
        Figures.from_hf({**SMALL, "model_type": "qwen3", "vocab_size": None, "head_dim": None})


def test_an_unknown_type_is_an_estimate():
    figures = Figures.from_hf({**SMALL, "model_type": "new"})
    assert figures.estimate
    # per layer: q and o 2*32*64, k and v 2*32*32, mlp 3*32*48, norms 2*32; then the last norm, embedding and head
    assert figures.num_block_params == 4096 + 2048 + 4608 + 64
    assert figures.num_params == 2 * 10816 + 32 + 2 * 60 * 32


def test_flops():
    figures = Figures.from_hf({**SMALL, "model_type": "llama"})
    # 6 N + 12 * layers * heads * head_dim * length
    assert figures.flops_per_token(10) == 6 * figures.num_params + 12 * 2 * 4 * 16 * 10
