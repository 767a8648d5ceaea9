"""The mask of every template, token by token, against one worked out from a second account of what the template writes.

The expected mask knows nothing of chat.py and turns.py: it is by characters of the pieces in formats.py, and of bytes of
tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dtrain.config.compose import choices, group_choice
from dtrain.config.validate import validate_spec
from dtrain.data.template import with_template
from dtrain.data.tokenizer import TextTokenizer
from tests.unit.data.fakes import SPECIAL, WORDS, write_tokenizer
from tests.unit.data.formats import EOS, PROMPTS, WITH_REASONING, WITH_TOOLS, WRITERS

NAMED = [name for name in choices()["template"] if name != "auto"]
TOOL = {"type": "function", "function": {"name": "weigh", "description": "says what it weighs, in <|im_end|>",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}}  # fmt: skip
PIECES = [
    "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<end_of_turn>", "<start_of_turn>model\n", "[INST]", "[/INST]", EOS, "### Response:\n", "Assistant:", "<think>\n", "</think>",
    "<tool_call>\n{}\n</tool_call>", "{% generation %}", "{{ messages }}", "{% endgeneration %}", " ", "\n", "\t ", "\n\n", "the cat", "user",
    "Grüße 日本語", "🐈‍⬛", "e\u0301", "\u200d", "؟", "a", "\r\n", "\x1c", "\\", '"',
]  # fmt: skip
CONTENT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=5
).map("".join)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["what", "n", "ö"]),
    st.one_of(CONTENT, st.integers(), st.none(), st.lists(st.booleans(), max_size=2)),
    max_size=2,
)
CALLS = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["weigh", "find it"]), "arguments": ARGUMENTS}),
    min_size=1,
    max_size=2,
).map(lambda calls: [{"type": "function", "function": call} for call in calls])


@dataclasses.dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[dict[str, Any]] | None


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Conversation:
    """As the template takes them: any number of turns, a system message in front or none, answers alone or in a row."""
    tools = [TOOL] if name in WITH_TOOLS and draw(st.booleans()) else None
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(CONTENT)})
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 0]))):
            if tools and draw(st.booleans()):
                content = draw(st.one_of(st.none(), CONTENT))
                messages.append({"role": "assistant", "content": content, "tool_calls": draw(CALLS)})
                messages += [{"role": "tool", "content": draw(CONTENT)} for _ in messages[-1]["tool_calls"]]
            messages.append({"role": "assistant", "content": draw(CONTENT)})
            if name in WITH_REASONING and draw(st.booleans()):
                messages[-1]["reasoning_content"] = draw(CONTENT)
    if draw(st.booleans()):
        learned = [message["role"] == "assistant" for message in messages]
    else:
        learned = [draw(st.booleans()) for _ in messages]
    return Conversation(messages, learned, tools)


def num_bytes(tokenizer: TextTokenizer, token_id: int) -> int:
    return len(tokenizer._tokenizer.id_to_token(token_id))  # in the byte alphabet each byte is one character


def expected_mask(
    tokenizer: TextTokenizer, ids: list[int], pieces: list[tuple[str, int | None]], learned: list[bool]
) -> list[bool]:
    """A token is a target if its first byte is of a learned piece; the tokens' bytes are those of the text, in order."""
    of_byte = [whose is not None and learned[whose] for text, whose in pieces for _ in text.encode()]
    at, mask = 0, []
    for token_id in ids:
        mask.append(of_byte[at] and at > 0)
        at += num_bytes(tokenizer, token_id)
    assert at == len(of_byte)
    return mask


def dressed(folder: Path, name: str, *, marked: bool, trim_offsets: bool) -> Path:
    """A model's folder with a template of dtrain, with or without its generation marks."""
    spec = validate_spec("template", group_choice("template", name))
    text = spec.text if marked else re.sub(r"\{% (end)?generation %\}\n?", "", spec.text)
    assert marked == ("generation %" in text)
    own = write_tokenizer(folder / "own", None, trim_offsets=trim_offsets)
    return with_template(own, dataclasses.replace(spec, text=text), folder / "cache")


FAST = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=list(HealthCheck), database=None
)


def sentencepiece() -> Tokenizer:
    """With a space put before a text, and before what follows a special token, as of Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_], show_progress=False)
    )
    return tokenizer


def composing() -> Tokenizer:
    """That makes one character of `e` and an accent before it cuts, as of Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def words() -> Tokenizer:
    """Of whole words, which leaves out the white space between them."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "assistant": 3, ":": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, composing, words])
@pytest.mark.parametrize("name", ["chatml", "mistral", "plain"])
def test_the_mask_with_other_tokenizers(tmp_path: Path, name: str, make: Callable[[], Tokenizer]) -> None:
    made = make()
    made.add_special_tokens(SPECIAL)
    own = write_tokenizer(tmp_path / "own", None)
    made.save(str(own / "tokenizer.json"))
    (own / "generation_config.json").unlink()
    tokenizer = TextTokenizer.load(
        with_template(own, validate_spec("template", group_choice("template", name)), tmp_path / "cache")
    )

    @settings(FAST, max_examples=50)
    @given(conversations(name))
    def check(one: Conversation) -> None:
        pieces = list(WRITERS[name](one.messages, one.tools))
        whose = [piece[1] for piece in pieces for _ in piece[0]]
        encoding = made.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        ids, targets = tokenizer.chat(one.messages, one.learned, one.tools)
        assert ids == encoding.ids
        first = [whose[start] for start, _ in encoding.offsets]
        assert targets == [i > 0 and each is not None and one.learned[each] for i, each in enumerate(first)]

    check()


def test_there_is_a_second_account_of_every_template() -> None:
    assert set(NAMED) == set(WRITERS) == set(PROMPTS)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_the_mask_is_that_of_the_characters(tmp_path: Path, name: str, marked: bool) -> None:
    tokenizers = [
        TextTokenizer.load(dressed(tmp_path / str(trim), name, marked=marked, trim_offsets=trim))
        for trim in (False, True)
    ]

    @FAST
    @given(conversations(name), st.sampled_from(tokenizers))
    def check(one: Conversation, tokenizer: TextTokenizer) -> None:
        pieces = list(WRITERS[name](one.messages, one.tools))
        text = "".join(text for text, _ in pieces)
        ids, targets = tokenizer.chat(one.messages, one.learned, one.tools)
        assert ids == tokenizer.encode(text)
        assert targets == expected_mask(tokenizer, ids, pieces, one.learned)

    check()


@pytest.mark.parametrize("name", NAMED)
def test_the_text_and_the_mask_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = dressed(tmp_path, name, marked=True, trim_offsets=False)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), TextTokenizer.load(folder)
    template = ours._templates["default"].template

    @settings(FAST, max_examples=60)
    @given(conversations(name))
    def check(one: Conversation) -> None:
        plain = "".join(text for text, _ in WRITERS[name](one.messages, one.tools))
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                one.messages, tools=one.tools, tokenize=False, add_generation_prompt=prompt
            )
            assert expected == plain + PROMPTS[name] * prompt
            assert template.render(one.messages, one.tools, add_generation_prompt=prompt) == expected
        encoded = theirs.apply_chat_template(
            one.messages, tools=one.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, targets = ours.chat(one.messages, None, one.tools)
        assert ids == encoded["input_ids"]
        # Theirs also learns a token that begins before the turn and reaches into it.
        starts = {
            start
            for start, _ in ours._templates["default"].spans(
                one.messages, [m["role"] == "assistant" for m in one.messages], one.tools
            )[1]
        }
        crosses = [
            any(a < start < b for start in starts)
            for a, b in ours._tokenizer.encode(expected, add_special_tokens=False).offsets
        ]
        assert [
            bool(flag) and not across for flag, across in zip(encoded["assistant_masks"], crosses, strict=False)
        ] == targets

    check()
