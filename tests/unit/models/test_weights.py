"""Stored weights by slices against what transformers saved; fresh ones against the model's rules."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.errors import ModelError
from dtrain.models._causal import build_causal
from tests.unit.models.conftest import load, write_config


def _saved(folder, model_type="qwen2", *, shard="50GB", **changes):
    """A folder as transformers writes it, and the model that is in it."""
    config = AutoConfig.from_pretrained(write_config(folder, model_type, **changes))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for param in model.parameters():
        param.data.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder, model


def _rename(folder, change):
    """Rewrite the single file with other names; None drops a tensor."""
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shard", ["50GB", "8KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_every_parameter_comes_back(tmp_path, kind, tied, shard):
    folder, model = _saved(tmp_path / "m", kind, shard=shard, tie_word_embeddings=tied)
    assert len(list(folder.glob("*.safetensors"))) == 1 or shard == "8KB"
    bundle = build_causal(folder, seed=0)
    theirs = dict(model.named_parameters())
    assert dict(bundle.module.named_parameters()).keys() == theirs.keys()
    for name, want in theirs.items():
        assert torch.equal(bundle.weights.read(name, 0, want.numel()), want.data.flatten()), name


def test_any_range_is_read(tmp_path):
    folder, model = _saved(tmp_path / "m")
    weights = build_causal(folder, seed=0).weights
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        flat = model.get_parameter(name).data.flatten()
        for start, numel in [(0, 1), (31, 2), (5, 27), (len(flat) - 1, 1), (7, 0)]:
            assert torch.equal(weights.read(name, start, numel), flat[start : start + numel])


def test_the_stored_dtype_is_kept(tmp_path):
    folder, model = _saved(tmp_path / "m")
    model.to(torch.bfloat16).save_pretrained(folder)
    values = build_causal(folder, seed=0).weights.read("model.norm.weight", 0, 4)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, model.model.norm.weight.data[:4])


def test_a_checkpoint_of_the_base_model_has_no_prefix(tmp_path):
    folder, model = _saved(tmp_path / "m", tie_word_embeddings=True)
    _rename(folder, lambda name: name.removeprefix("model."))
    weights = build_causal(folder, seed=0).weights
    assert torch.equal(weights.read("model.norm.weight", 0, 32), model.model.norm.weight.data)


def test_a_tied_tensor_may_have_either_name_or_both(tmp_path):
    folder, model = _saved(tmp_path / "m", tie_word_embeddings=True)
    want = model.lm_head.weight.data.flatten()
    _rename(folder, lambda name: "lm_head.weight" if "embed" in name else name)
    assert torch.equal(build_causal(folder, seed=0).weights.read("model.embed_tokens.weight", 0, len(want)), want)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.embed_tokens.weight": tensors["lm_head.weight"].clone()}, folder / "model.safetensors")
    assert torch.equal(build_causal(folder, seed=0).weights.read("model.embed_tokens.weight", 0, len(want)), want)


def test_what_does_not_match_is_listed_and_counted(tmp_path):
    folder, _ = _saved(tmp_path / "m")
    _rename(folder, lambda name: name.replace("gate_proj", "gate").replace("norm", "nrm"))
    with pytest.raises(ModelError) as caught:
        build_causal(folder, seed=0)
    text = str(caught.value)
    # two layers with gate and two norms each, and the last norm: 2 * 3 + 1
    assert "missing in the files: model.layers.0." in text
    assert text.count("and 2 more (7 in all)") == 2


def test_another_shape_is_named(tmp_path):
    folder, _ = _saved(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 61}))
    with pytest.raises(
        ModelError, match=r"model\.embed_tokens\.weight: \[61, 32\] in the model, \[60, 32\] in the files"
    ):
        build_causal(folder, seed=0)


def test_a_damaged_file_is_named(tmp_path):
    folder, _ = _saved(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        build_causal(folder, seed=0)
    path.unlink()
    with pytest.raises(ModelError, match="neither"):
        build_causal(folder, seed=0)


def test_fresh_values_depend_on_seed_and_name_only(tmp_path):
    folder = write_config(tmp_path / "m", "qwen2")
    one, other = (build_causal(folder, seed=1, from_scratch=True) for _ in range(2))
    names = [name for name, _ in one.module.named_parameters()]
    sizes = {name: param.numel() for name, param in one.module.named_parameters()}
    forward = {name: one.weights.read(name, 0, sizes[name]) for name in names}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for name in reversed(names):
        half = sizes[name] // 2
        parts = [other.weights.read(name, half, sizes[name] - half), other.weights.read(name, 0, half)]
        assert torch.equal(torch.cat(parts[::-1]), forward[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    third = build_causal(folder, seed=2, from_scratch=True).weights
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(third.read(name, 0, 48), forward[name][:48])
    assert not torch.equal(forward[name], forward[name.replace("layers.1", "layers.0")])


def test_fresh_values_follow_the_rules_of_the_model(make):
    _, module, _ = make("qwen2", initializer_range=0.05, hidden_size=64, vocab_size=500, pad_token_id=3)
    for name, param in module.named_parameters():
        if "norm" in name:
            assert torch.equal(param.data, torch.ones_like(param)), name
        elif name.endswith("bias"):
            assert torch.equal(param.data, torch.zeros_like(param)), name
        else:
            # 1536 values at least: their deviation is within 10 % of 0.05 (5.5 standard errors)
            assert param.std().item() == pytest.approx(0.05, rel=0.1), name
    assert module.model.embed_tokens.weight[3].count_nonzero() == 0


def test_fresh_values_with_rules_for_a_whole_block(make):
    # GPT-2 divides the init of projections into the residual stream by sqrt(2 * layers) = 2.
    _, module, _ = make(
        "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=32, num_hidden_layers=2, initializer_range=0.02
    )
    params = dict(module.named_parameters())
    assert params["transformer.h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert params["transformer.h.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_few_modules_are_held(tmp_path):
    bundle = build_causal(write_config(tmp_path / "m", "qwen2"), seed=0, from_scratch=True)
    load(bundle)
    assert len(bundle.weights._kept) == 2
