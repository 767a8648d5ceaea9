from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.errors import ModelError
from dtrain.models.hf import HF
from dtrain.models.tiny import Tiny
from tests.unit.models.conftest import SMALL, load

TINY = Tiny(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=400)


@pytest.fixture
def folder(tmp_path):
    """A model as a user has it: config, tokenizer, weights."""
    folder = tmp_path / "my-model"
    shutil.copytree(TINY.assets(lambda: ["some text here"], tmp_path / "made"), folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def _edit(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_complete_folder_is_used_as_it_is(folder, tmp_path):
    spec = HF(path=str(folder))
    assert spec.assets(list, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()
    bundle = spec.build(folder, seed=0)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    module = load(bundle)
    assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in module.named_parameters())
    assert spec.figures().num_params == sum(p.numel() for p in theirs.parameters())


def test_a_preset_pointed_at_a_folder_plans_for_that_folder(folder, tmp_path):
    preset = HF(path=str(folder), architecture={**SMALL, "model_type": "llama"})
    assert preset.figures() == HF(path=str(folder)).figures()
    assert preset.assets(list, tmp_path / "cache") == folder


def test_a_missing_padding_token_is_asked_for_with_a_candidate(folder, tmp_path):
    _edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ModelError, match=r"model.pad_token is needed.*model.pad_token='<\|pad\|>'"):
        HF(path=str(folder)).assets(list, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"'<nope>' is not a token.*'<\|pad\|>'"):
        HF(path=str(folder), pad_token="<nope>").assets(list, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("pad", ["<|pad|>", "<|endoftext|>"])
def test_a_given_padding_token_makes_an_overlay(folder, tmp_path, pad):
    _edit(folder / "tokenizer_config.json", pad_token=None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = HF(path=str(folder), pad_token=pad)
    overlay = spec.assets(list, tmp_path / "cache")
    assert overlay.parent == tmp_path / "cache"
    assert json.loads((overlay / "tokenizer_config.json").read_text())["pad_token"] == pad
    assert (overlay / "model.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert spec.assets(list, tmp_path / "cache") == overlay
    assert len(list((tmp_path / "cache").iterdir())) == 1
    spec.build(overlay, seed=0)


def test_without_a_spare_token_the_end_of_text_is_named_with_its_price(folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 3]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    _edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ModelError, match=r"no spare token; model.pad_token='<\|endoftext\|>'.*never learn to stop"):
        HF(path=str(folder)).assets(list, tmp_path / "cache")


def test_a_folder_with_slow_tokenizer_files_only_is_converted(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    want = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("some text").ids
    (folder / "tokenizer.json").unlink()
    overlay = HF(path=str(folder), pad_token="<|pad|>").assets(list, tmp_path / "cache")
    assert Tokenizer.from_file(str(overlay / "tokenizer.json")).encode("some text").ids == want
    assert not (folder / "tokenizer.json").exists()


def test_pickled_weights_are_never_read(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights.*save_pretrained"):
        HF(path=str(folder)).assets(list, tmp_path)
    assert HF(path=str(folder), from_scratch=True).assets(list, tmp_path) == folder


def test_missing_shards_are_counted(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} weight files are missing, {shards[1].name} first"):
        HF(path=str(folder)).assets(list, tmp_path)


def test_paths_that_are_not_there(folder, tmp_path):
    with pytest.raises(ModelError, match=f"no such folder; did you mean {folder}"):
        HF(path=str(folder.parent / "my-modle")).assets(list, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no config"):
        HF(path=str(folder)).assets(list, tmp_path)


def test_offline_a_repository_has_to_be_in_the_cache(tmp_path):
    spec = HF(path="someone/some-model", revision="v1")
    with pytest.raises(ModelError, match=r"at revision 'v1'.*HF_HUB_OFFLINE=1.*hf download someone/some-model"):
        spec.assets(list, tmp_path)
    with pytest.raises(ModelError, match="hf download someone/some-model config"):
        spec.figures()


def test_a_complete_repository_in_the_cache_needs_no_network(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    at = tmp_path / "hub" / "models--someone--some-model"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("abc")
    shutil.copytree(folder, at / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = HF(path="someone/some-model")
    assert spec.assets(list, tmp_path / "cache") == at / "snapshots" / "abc"
    assert spec.figures() == HF(path=str(folder)).figures()
    other = HF(path="someone/some-model", architecture={**SMALL, "model_type": "qwen2"})
    with pytest.raises(ModelError, match=r"does not describe.*vocab 60 planned, 400 found.*model=hf"):
        other.assets(list, tmp_path / "cache")


def test_modelscope_is_named_where_it_is_not_installed(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ModelError, match="modelscope"):
        HF(path="someone/some-model", hub="modelscope").assets(list, tmp_path)


def test_a_path_is_needed():
    assert "model.path is needed" in HF().problems()[0]
    assert HF(path="a/b").problems() == []
