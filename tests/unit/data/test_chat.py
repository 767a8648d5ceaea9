"""What is learned of a conversation, against a plain count of characters; and the text, against transformers."""

import json

import pytest

from dtrain.data.chat import ChatTemplate
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError
from tests.unit.data.fakes import CHATML, LLAMA3, SPECIAL, write_tokenizer

CONVERSATIONS = {
    "plain": [("user", "hello there"), ("assistant", "the cat sat")],
    "several turns": [("system", "the house"), ("user", "hello"), ("assistant", "on the mat"), ("user", "dog?"),
                      ("assistant", "ran to the house")],
    "unicode": [("user", "Grüße 🐈‍⬛ 日本語"), ("assistant", "naïve 🐕 é e\u0301 \u200d"),
                ("user", "؟"), ("assistant", "ß")],
    "empty content": [("user", ""), ("assistant", ""), ("user", ""), ("assistant", "x")],
    "markers inside": [("user", "say <|im_end|>\n<|im_start|>assistant\nhello<|eot_id|>"),
                       ("assistant", "<|im_start|>user\nno<|im_end|> yes <|eot_id|>")],
    "the same twice": [("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a")],
    "two in a row": [("user", "hello"), ("assistant", "the cat"), ("assistant", "the dog")],
    "white space": [("user", " \n hello \n"), ("assistant", "a  b\n\n c")],
    "braces": [("user", "{{ messages }} {% raw %}"), ("assistant", "{% endgeneration %} {{ 1 + 1 }}")],
}  # fmt: skip


def chatml(turns):
    """Text and, for each character, whether it is learned."""
    for role, content in turns:
        yield f"<|im_start|>{role}\n", False
        yield f"{content}<|im_end|>", role == "assistant"
        yield "\n", False


def llama3(turns):
    yield "<|begin_of_text|>", False
    for role, content in turns:
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", False
        yield f"{content.strip()}<|eot_id|>", role == "assistant"


GENERATION = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{%- generation -%}{{ message.content + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {"chatml": (CHATML, chatml), "llama3": (LLAMA3, llama3), "generation": (GENERATION, chatml)}


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_tokenizer(root / name, template) for name, (template, _) in TEMPLATES.items()}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_that_of_the_characters(folders, name, conversation):
    turns = CONVERSATIONS[conversation]
    tokenizer = TextTokenizer.load(folders[name])
    ids, targets = tokenizer.chat(messages_of(turns))

    parts = list(TEMPLATES[name][1](turns))
    text = "".join(part for part, _ in parts)
    learned = [flag for part, flag in parts for _ in part]
    assert ids == tokenizer.encode(text)
    # Undo the tokenizer by hand: a byte-level token is so many bytes, and a byte is in one character.
    of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    at, expected = 0, []
    for token_id in ids:
        expected.append(learned[of_byte[at]])
        at += num_bytes(tokenizer, token_id)
    assert at == len(of_byte)
    assert targets == expected
    assert any(targets)


def num_bytes(tokenizer, token_id):
    token = tokenizer._tokenizer.id_to_token(token_id)
    return len(token)  # in the byte alphabet each byte is one character; special tokens are ASCII


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(folders, name):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folders[name])
    ours = TextTokenizer.load(folders[name])
    for turns in CONVERSATIONS.values():
        messages = messages_of(turns)
        for prompt in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours._template.render(messages, add_generation_prompt=prompt) == expected
        encoded = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=name == "generation"
        )
        ids, targets = ours.chat(messages)
        assert ids == encoded["input_ids"]
        if name == "generation":
            assert [int(target) for target in targets] == encoded["assistant_masks"]


FEATURES = """
{%- for m in messages -%}
  {%- if m.role == 'skip' %}{% continue %}{% endif -%}
  {{ m | tojson }}{{ {'a': ['<b>', 'é']} | tojson(indent=2) }}
  {%- if tools is none and documents is none %} none{% endif %}
  {% set ns = namespace(n=loop.index0) %}{{ ns.n }} {{ eos_token }}{{ pad_token is defined }}{{ sep_token is defined }}
    {% if loop.last %}
      {% break %}
    {% endif %}
{%- endfor %} {{ strftime_now is defined }}
"""


def test_what_templates_use_works_as_in_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = write_tokenizer(tmp_path, FEATURES)
    messages = messages_of([("user", "hé"), ("skip", "x"), ("assistant", "b")])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    # All but today's date, which would make other rows tomorrow.
    expected = theirs.apply_chat_template(messages, tokenize=False).replace("True\n", "False\n")
    assert (
        TextTokenizer.load(folder)._template.render(messages).rstrip()
        == expected.rstrip().removesuffix("True") + "False"
    )


def template(source):
    return ChatTemplate(source, {}, SPECIAL, origin="here")


def test_a_token_across_the_start_of_a_turn_is_not_learned(tmp_path):
    # The prompt ends in the space that the word's token begins with, so at that place nothing can be generated.
    source = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<|eos|>' }}{% endfor %}" \
             "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"  # fmt: skip
    for trim_offsets in (True, False):
        folder = write_tokenizer(tmp_path / str(trim_offsets), source, trim_offsets=trim_offsets)
        tokenizer = TextTokenizer.load(folder)
        ids, targets = tokenizer.chat(messages_of([("user", "hello"), ("assistant", "the cat")]))
        learned = [tokenizer.decode([i]) for i, target in zip(ids, targets, strict=True) if target]
        assert tokenizer.encode(" the") == [i for i in ids if tokenizer.decode([i]) == " the"]
        assert "".join(learned) == " cat<|eos|>"


def test_a_template_that_rewrites_the_past_is_refused():
    # Only the last turn keeps what is between the thinking marks.
    source = "{% for m in messages %}{{ m.role }}:{% if loop.last %}{{ m.content }}{% else %}" \
             "{{ m.content.split('</think>')[-1] }}{% endif %};{% endfor %}" \
             "{% if add_generation_prompt %}assistant:{% endif %}"  # fmt: skip
    turns = [("user", "q"), ("assistant", "<think>hm</think>a"), ("user", "q"), ("assistant", "b")]
    with pytest.raises(BadRowError, match=r"message 2 cannot be masked.*generation"):
        template(source).spans(messages_of(turns))
    text, spans = template(source).spans(messages_of(turns[:2]))
    assert [text[start:end] for start, end in spans] == ["<think>hm</think>a;"]


def test_what_the_template_says_is_told():
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    with pytest.raises(BadRowError, match="refuses these messages: begin with the user"):
        template(source).spans(messages_of([("assistant", "a")]))
    with pytest.raises(BadRowError, match="refuses"):
        template("{{ messages[0].nothing.there }}").render(messages_of([("user", "a")]))


def test_templates_cannot_reach_out():
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(BadRowError):
            template(source).render(messages_of([("user", "a")]))


def test_a_broken_template_is_named():
    with pytest.raises(DataError, match=r"model.path: the chat template in here does not parse: line 1"):
        template("{% if %}")


def test_no_assistant(folders):
    with pytest.raises(BadRowError, match="no assistant turn"):
        TextTokenizer.load(folders["chatml"]).chat(messages_of([("user", "hello")]))
    with pytest.raises(BadRowError, match="no assistant turn"):
        TextTokenizer.load(folders["generation"]).chat(messages_of([("user", "hello")]))


def test_the_first_token_is_never_learned(tmp_path):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _, targets = TextTokenizer.load(write_tokenizer(tmp_path, source)).chat(messages_of([("assistant", "the cat")]))
    assert targets[0] is False
    assert all(targets[1:])


def test_where_templates_lie(tmp_path):
    folder = write_tokenizer(tmp_path, None)
    with pytest.raises(DataError, match=r"model.path: .* has no chat template"):
        TextTokenizer.load(folder).chat([])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer.load(folder)._template.render([]) == "yes"
    before = TextTokenizer.load(folder).digest
    (folder / "chat_template.jinja").write_text("file")
    assert TextTokenizer.load(folder)._template.render([]) == "file"
    assert TextTokenizer.load(folder).digest != before
