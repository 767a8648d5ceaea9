from __future__ import annotations

import itertools
import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from dtrain.models._tokenizer import sample_texts
from dtrain.models.tiny import Tiny

TEXTS = [
    f"The quick brown fox number {i} jumps over {i * 7} lazy dogs, doesn't it?\n\n\tYes: été {i}." for i in range(200)
]
SMALL = Tiny(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=400)


def test_assets_are_made_once_for_the_same_text_and_values(tmp_path):
    reads = []

    def texts():
        reads.append(1)
        return iter(TEXTS)

    folder = SMALL.assets(texts, tmp_path)
    before = (folder / "tokenizer.json").read_bytes()
    made = (folder / "tokenizer.json").stat().st_mtime_ns
    assert SMALL.assets(texts, tmp_path) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    again = SMALL.assets(texts, tmp_path / "other")
    assert (again.name, (again / "tokenizer.json").read_bytes()) == (folder.name, before)
    assert SMALL.assets(lambda: TEXTS[1:], tmp_path) != folder
    assert Tiny(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=399).assets(texts, tmp_path) != folder


def test_transformers_reads_the_folder_as_we_do(tmp_path):
    folder = SMALL.assets(lambda: TEXTS, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*TEXTS[:3], "12345  a\r\n b", "e\u0301 \u00e9 日本", "<|im_start|>user\nhi<|im_end|>"):
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text.replace("e\u0301", "\u00e9")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length) == (0, 3, 4096)
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox"}, {"role": "user", "content": "so"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nfox<|im_end|>\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
    )
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.architectures) == (400, ["Qwen2ForCausalLM"])


def test_the_vocabulary_is_the_field_even_where_text_is_short(tmp_path):
    folder = SMALL.assets(lambda: ["ab"], tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 260  # 256 bytes and 4 special tokens; "ab" occurs once: no merge
    assert tokenizer.decode(tokenizer.encode("été").ids) == "été"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 400
    assert SMALL.assets(lambda: [], tmp_path).is_dir()


def test_the_model_has_the_size_of_its_figures(tmp_path):
    bundle = SMALL.build(SMALL.assets(lambda: TEXTS, tmp_path), seed=0)
    figures = SMALL.figures()
    assert sum(p.numel() for p in bundle.module.parameters()) == figures.num_params
    assert sum(p.numel() for p in bundle.blocks[0].parameters()) == figures.num_block_params
    assert len(bundle.blocks) == 2
    assert 5e6 < Tiny().figures().num_params < 8e6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden": 100, "heads": 3}, "nearest: 96 or 102"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"vocab": 259}, "260"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_values_that_do_not_fit_are_problems(changes, match):
    assert any(match in problem for problem in Tiny(**changes).problems())
    assert Tiny().problems() == []


@pytest.mark.parametrize("num_chars", [10, 55, 10_000])
def test_a_sample_is_even_and_within_its_size(num_chars):
    texts = [f"{i:05d}" for i in range(100)]
    sample = sample_texts(texts, num_chars)
    assert sum(map(len, sample)) <= num_chars
    steps = {int(b) - int(a) for a, b in itertools.pairwise(sample)}
    # 5 characters each. Into 10 go 2; into 55 go 11, and every 16th of 100 is 7 (every 8th is 13); all into 10000.
    assert (len(sample), len(steps)) == {10: (2, 1), 55: (7, 1), 10_000: (100, 1)}[num_chars]
    assert sample_texts(["x" * 99], 10) == ["x" * 10]
