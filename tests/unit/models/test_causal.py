"""The wrapper against transformers' own model with the same weights."""

from __future__ import annotations

import pytest
import torch

from dtrain.errors import ModelError
from dtrain.models._causal import build_causal
from tests.unit.models.conftest import write_config

KINDS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 16}, "rope_theta": 500000.0},
    "mistral": {"sliding_window": 5},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 0.05, "query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "phi3": {"pad_token_id": 0},
}  # fmt: skip


def batch(docs, *, targets=None):
    """One packed row of these documents; by default all but the first token of each is a target."""
    tokens = torch.cat(docs)
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])
    index = (positions > 0).nonzero()[:, 0] - 1 if targets is None else targets
    return {"tokens": tokens[None], "positions": positions[None], "target_index": index,
            "target_ids": tokens[(index + 1) % len(tokens)]}  # fmt: skip


def docs(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 60, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(make, kind):
    _, module, peer = make(kind, **KINDS[kind])
    (doc,) = docs(12)
    total = module(**batch([doc]))
    want = peer(input_ids=doc[None], labels=doc[None]).loss * 11  # a mean over 11 targets
    torch.testing.assert_close(total, want, rtol=2e-6, atol=0)
    total.backward()
    want.backward()
    theirs = dict(peer.named_parameters())
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_those_of_a_model_built_normally(make, kind):
    bundle, module, peer = make(kind, **KINDS[kind])
    theirs = dict(peer.named_buffers())
    ours = dict(module.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert [block.__class__ for block in bundle.blocks] == [peer.base_model.layers[0].__class__] * 2


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_documents_of_a_packed_row_do_not_see_each_other(make, kind, attention):
    _, module, _ = make(kind, attention=attention, **KINDS[kind])
    first, second, other = (*docs(7, 9), *docs(7, seed=5))
    alone = [module(**batch([doc])) for doc in (first, second)]
    torch.testing.assert_close(module(**batch([first, second])), sum(alone), rtol=1e-6, atol=0)
    of_second = torch.arange(7, 15)
    before = module(**batch([first, second], targets=of_second))
    assert torch.equal(module(**batch([other, second], targets=of_second)), before)
    # and the other way round: a change in a document does change its own loss
    assert module(**batch([other, second])) != module(**batch([first, second]))


def test_padding_and_other_rows_change_nothing(make):
    _, module, _ = make()
    first, second = docs(7, 9)
    tokens = torch.zeros(2, 9, dtype=torch.long)
    tokens[0, :7], tokens[1] = first, second
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(2)]), torch.arange(9)])
    index = torch.cat([torch.arange(6), torch.arange(9, 17)])
    together = module(tokens, positions, index, tokens.flatten()[index + 1])
    torch.testing.assert_close(together, sum(module(**batch([d])) for d in (first, second)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_no_target_gives_every_parameter_a_zero_gradient(make, tied):
    _, module, _ = make(tie_word_embeddings=tied)
    loss = module(**batch(docs(2), targets=torch.zeros(0, dtype=torch.long)))
    assert loss.item() == 0.0
    loss.backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or p.grad.count_nonzero()] == []


def test_blocks_can_be_checkpointed(make):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    bundle, module, _ = make()
    rows = batch(docs(7, 9))
    module(**rows).backward()
    want = {name: param.grad.clone() for name, param in module.named_parameters()}
    module.zero_grad()
    layers = module.model.layers
    for i in range(len(bundle.blocks)):
        layers[i] = checkpoint_wrapper(layers[i])
    module(**rows).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.grad, want[name.replace("._checkpoint_wrapped_module", "")])


def test_parameters_are_fp32_and_on_meta(tmp_path):
    folder = write_config(tmp_path / "m", "qwen2", torch_dtype="bfloat16", tie_word_embeddings=True)
    bundle = build_causal(folder, seed=0, from_scratch=True)
    params = dict(bundle.module.named_parameters())
    assert {(p.dtype, p.device.type) for p in params.values()} == {(torch.float32, "meta")}
    assert "lm_head.weight" not in params
    assert bundle.module.lm_head.weight is params["model.embed_tokens.weight"]
    assert bundle.export_name("model.norm.weight") == "model.norm.weight"


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(tmp_path):
    folder = write_config(tmp_path / "m", "falcon_h1", lm_head_multiplier=2.0, mamba_d_ssm=32, mamba_n_heads=4)
    with pytest.raises(ModelError, match="not supported"):
        build_causal(folder, seed=0, from_scratch=True)


@pytest.mark.parametrize(
    ("kind", "match"),
    [("qwen3_moe", "mixture of experts"), ("bert", "causal|decoder|head"), ("nonsense", "config.json")],
)
def test_other_models_are_refused(tmp_path, kind, match):
    with pytest.raises(ModelError, match=match):
        build_causal(write_config(tmp_path / "m", kind), seed=0, from_scratch=True)
