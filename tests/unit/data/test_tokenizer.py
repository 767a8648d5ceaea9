import json

import pytest

from dtrain.data.tokenizer import TextTokenizer, tokenizer_digest
from dtrain.errors import DataError
from tests.unit.data.fakes import SPECIAL, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_there_and_back(folder):
    tokenizer = TextTokenizer.load(folder)
    for text in ("", "the cat", "Grüße 🐈 日本語\r\n\t", "a<|eos|>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(["the", "the cat"]) == [tokenizer.encode("the"), tokenizer.encode("the cat")]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (0, 1, SPECIAL.index("<|begin_of_text|>"))
    assert max(tokenizer.encode("the dog ran")) < tokenizer.vocab_size
    assert tokenizer.digest == tokenizer_digest(folder)


def test_special_tokens_as_objects_and_missing_ones(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|eot_id|>", "special": True}, "pad_token": None}))
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.pad_id == SPECIAL.index("<|eot_id|>")
    assert tokenizer.bos_id is None
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(DataError, match=r"model.path: .*tokenizer_config.json names no `eos_token`"):
        _ = TextTokenizer.load(tmp_path).eos_id
    assert TextTokenizer.load(tmp_path).pad_id == 0


def test_truncation_asked_for_by_the_file_is_not_done(folder, tmp_path):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    text = "the cat sat on the mat"
    assert TextTokenizer.load(tmp_path).encode(text) == TextTokenizer.load(folder).encode(text)


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(DataError, match=r"model.path: no tokenizer.json in"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"model.path: .*tokenizer.json cannot be read"):
        TextTokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"model.path: .*tokenizer_config.json is not JSON"):
        TextTokenizer.load(tmp_path)
