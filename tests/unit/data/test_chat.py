"""Rendering as transformers does it, and the turns of templates that are not as well behaved as those of dtrain."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.data.chat import ChatTemplate
from dtrain.data.tokenizer import TextTokenizer
from dtrain.data.turns import Turns
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError
from tests.unit.data.fakes import CHATML, LLAMA3, SPECIAL, write_tokenizer

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"what": "a cat"}}}
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]


def said(*turns):
    """Messages of texts: the user's and the assistant's in turn, unless a role is given."""
    roles = ["user", "assistant"] * len(turns)
    return [{"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else {"role": role, "content": turn}
            for role, turn in zip(roles, turns, strict=False)]  # fmt: skip


def turns_of(source):
    return Turns(ChatTemplate(source, {"eos_token": "<|eos|>"}, origin="here"), SPECIAL, ["<|eos|>"])


def learned(source, messages, which=None, tools=None):
    """The texts that are learned."""
    which = [message["role"] == "assistant" for message in messages] if which is None else which
    text, spans = turns_of(source).spans(messages, which, tools)
    return [text[start:end] for start, end in spans]


FEATURES = """
{%- for m in messages -%}
  {%- if m.role == 'skip' %}{% continue %}{% endif -%}
  {{ m | tojson }}{{ m.reasoning_content }}{{ {'a': ['<b>', 'é']} | tojson(indent=2) }}
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
    messages = [*said("hé", ("skip", "x")), {"role": "assistant", "content": "b", "name": None, "thinking": "so"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    # All but today's date, which would make other rows tomorrow.
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert expected.endswith("True")
    template = TextTokenizer.load(folder)._templates["default"].template
    ours = [{**message, "train": True} for message in messages]  # a word to dtrain, which no template sees
    assert template.render(ours) == expected.removesuffix("True") + "False"


QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
  {%- set content = (m.content or '').split('</think>')[-1].lstrip('\\n') %}
  {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in (m.content or '') else '' %}
  {%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
  {{- content }}
  {%- for call in m.tool_calls or [] %}
    {{- '\\n' if (loop.first and content) or not loop.first else '' }}
    {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
  {%- endfor %}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
{%- if tools %}{% endif %}
"""
"""Takes the thinking out of turns before the last message of the user, and puts an empty one into the last turn."""


def qwen3(messages):
    """What it writes, and what of it is learned, said a second time."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", False
        content, thought = message["content"] or "", ""
        if message["role"] == "assistant":
            if "</think>" in content:
                thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
            if i > last and (i + 1 == len(messages) or thought):
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            calls = [json.dumps(call["function"]) for call in message.get("tool_calls") or []]
            said = message["content"] and message["content"].split("</think>")[-1].lstrip("\n")
            content += "\n" * bool(said and calls) + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        yield f"{content}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


TEXTS = st.lists(
    st.sampled_from(["hello", "<|im_end|>", " ", "\n", "<|im_start|>assistant\n", "ß 🐈‍⬛", "", "{{ x }}"]), max_size=4
).map("".join)
THOUGHT = st.one_of(TEXTS, st.tuples(TEXTS, TEXTS).map(lambda pair: f"<think>\n{pair[0]}\n</think>\n\n{pair[1]}"))
STEPS = st.lists(st.tuples(THOUGHT, TEXTS), max_size=2)
CONVERSATIONS = st.lists(st.tuples(TEXTS, STEPS, THOUGHT), min_size=1, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck), database=None)
@given(CONVERSATIONS)
def test_turns_of_a_template_that_rewrites_the_past_are_learned_as_they_stand(conversation):
    messages = []
    for asked, steps, answer in conversation:
        messages.append({"role": "user", "content": asked})
        for content, result in steps:
            messages += [
                {"role": "assistant", "content": content, "tool_calls": [CALL]},
                {"role": "tool", "content": result},
            ]
        messages.append({"role": "assistant", "content": answer})
    pieces = list(qwen3(messages))
    try:
        text, spans = TURNS_OF_QWEN3.spans(messages, [message["role"] == "assistant" for message in messages], TOOLS)
    except BadRowError as error:
        assert re.match(r"message \d+ cannot be masked: |message \d+ is not in the text: ", str(error))
        # Only where what is said is thinking alone or nothing, so that there is nothing to put a mark into.
        assert any(not (message["content"] or "").split("</think>")[-1].strip() for message in messages)
        return
    assert text == "".join(piece for piece, _ in pieces)
    at = [(len("".join(piece for piece, _ in pieces[:i])), piece) for i, (piece, flag) in enumerate(pieces) if flag]
    assert spans == [(start, start + len(piece)) for start, piece in at]


TURNS_OF_QWEN3 = turns_of(QWEN3)


def test_turns_of_a_template_that_rewrites_the_past():
    messages = said("q", "<think>\nhm\n</think>\n\na", "r", "<think>\nso\n</think>\n\nb")
    assert learned(QWEN3, messages) == ["a<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"]
    assert learned(QWEN3, said("q", "a", "r", "b")) == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]
    assert learned(QWEN3, messages, [False, False, False, True]) == ["<think>\nso\n</think>\n\nb<|im_end|>"]
    (note,) = TURNS_OF_QWEN3.notes()
    assert note.startswith("it writes the same messages in another way once others follow")


def test_a_turn_of_which_generation_begins_elsewhere_is_refused():
    # The prompt has thinking begin, and the turn has none: what was trained would not be what is generated.
    source = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}" \
             "{% if add_generation_prompt %}<|im_start|>assistant:<think>{% endif %}"  # fmt: skip
    with pytest.raises(BadRowError, match=r"message 2 cannot be masked: .*generation"):
        learned(source, said("q", "<think>hm</think>a"))
    marked = source.replace("{{ m.content", "{% generation %}{{ m.content").replace(
        "<|im_end|>", "<|im_end|>{% endgeneration %}"
    )
    marked = marked.replace("{% for m in messages %}", "{% for m in messages if m.role == 'assistant' %}")
    assert learned(marked, said(("assistant", "<think>hm</think>a"))) == ["a<|im_end|>"]
    with pytest.raises(BadRowError, match="message 1 cannot be masked"):  # the marks leave out where to stop
        learned(
            marked.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), said(("assistant", "a"))
        )


def test_the_system_message_in_the_last_message_of_the_user():
    source = "{% for m in messages %}{% if m.role == 'user' %}[INST] " \
             "{% if loop.last or loop.nextitem and not loop.nextitem.more %}{{ messages[0].content }}\n\n{% endif %}" \
             "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|eos|>{% endif %}{% endfor %}"  # fmt: skip
    messages = said(("system", "be kind"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    messages[2]["more"] = True
    assert learned(source, messages) == [" a<|eos|>", " b<|eos|>"]
    assert learned(source, messages, [True, True, True, True, True]) == ["q", " a<|eos|>", "be kind", "r", " b<|eos|>"]


def test_a_text_that_ends_with_more_than_the_turn():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|eos|>{% endif %}"  # fmt: skip
    assert learned(source, said("q", "a", "r", "b")) == ["a<|im_end|>", "b<|im_end|>"]
    assert learned(source, said("q", "a")) == ["a<|im_end|>"]
    assert turns_of(source).spans(said("q", "a"), [False, True])[0].endswith("a<|im_end|>\n<|eos|>")
    assert list(turns_of(source).notes()) == []
    assert list(dict.fromkeys(turns_of(source).ends())) == ["<|im_end|>"]
    always = source.replace("{% if add_generation_prompt %}", "").replace("{% else %}<|eos|>{% endif %}", "")
    with pytest.raises(
        BadRowError, match="message 2 cannot be masked: the chat template writes more, or something else, at the end"
    ):
        learned(always, said("q", "a"))


def test_a_row_of_which_only_the_last_turn_can_be_told():
    source = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    assert source != QWEN3
    messages = said("q", "a", "r", "b")
    with pytest.raises(BadRowError) as caught:
        learned(source, messages)
    assert "message 2 cannot be masked: the chat template asks for an answer by" in str(caught.value)
    assert "assistant\\n<think>\\n', and writes the turn without that" in str(caught.value)
    assert str(caught.value).endswith("objective.train_on=last_turn needs only the last")
    assert learned(source, messages, [False, False, False, True]) == ["\n</think>\n\nb<|im_end|>"]


def test_turns_that_the_next_header_ends():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" \
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
    assert learned(source, said("q", "a ", "r", "b")) == ["a ", "b"]
    rewriting = source.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    assert learned(rewriting, said("q", "<think>hm</think>a", "r", "b")) == ["a", "b"]


def test_a_message_that_the_template_leaves_out_is_refused():
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(
        BadRowError, match="message 1 is not in the text: the chat template leaves out what role `system`"
    ):
        learned(source, said(("system", "be kind"), ("user", "q"), ("assistant", "a")))
    calling = "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(
        BadRowError, match="message 2 is not in the text: the chat template leaves out what role `assistant`"
    ):
        learned(calling, [*said("q"), {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}])
    with pytest.raises(
        DataError,
        match="the rows have reasoning_content, which the chat template in here does not write; type template=qwen",
    ):
        learned(CHATML, [*said("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}])


def test_a_template_that_needs_todays_date():
    with pytest.raises(DataError, match="template: the one in here writes today's date, and other rows tomorrow"):
        learned("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}", said("q", "a"))
    assert (
        list(turns_of("{{ strftime_now('%d') }}").notes()) == []
    )  # a tokenizer with such a template reads texts all the same


LOOP = "{% for m in messages %}" \
       "{% if m.role == 'assistant' %}HERE{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" \
       "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


@pytest.mark.parametrize(("here", "note"), [
    ("<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", False),
    ("<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", False),
    ("<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", True),
    ("{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}", True),
    ("<|im_start|>assistant\n{{ m.content }}<|im_end|>\n", False),
])  # fmt: skip
def test_marks_that_take_more_or_less_than_the_turn(here, note):
    source = LOOP.replace("HERE", here)
    assert learned(source, said("q", "a", "r", "")) == ["a<|im_end|>", "<|im_end|>"]
    assert [bool(each) for each in turns_of(source).notes()] == [True] * note


def test_marks_that_leave_a_part_out_are_obeyed_and_told():
    here = "<|im_start|>assistant\n<think>\n</think>\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    source = LOOP.replace("HERE", here)
    assert learned(source, said("q", "a", "r", "b")) == ["a<|im_end|>", "b<|im_end|>"]
    assert [note.startswith("its generation marks") for note in turns_of(source).notes()] == [True]
    never = LOOP.replace(
        "HERE",
        "<|im_start|>assistant\n{% if 0 %}{% generation %}{% endgeneration %}{% endif %}{{ m.content }}<|im_end|>\n",
    )
    with pytest.raises(BadRowError, match="message 2: the generation marks of the chat template leave it out"):
        learned(never, said("q", "a"))


def test_a_template_that_ends_no_turn_is_told():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert learned(source, said("q", "a", "r", "b<|im_end|>")) == [" a\n", " b<|im_end|>\n"]
    assert [note.startswith("no special token ends a turn") for note in turns_of(source).notes()] == [True]


def test_a_turn_that_ends_only_where_another_follows():
    source = "{% for m in messages %}{{ '' if loop.first else '<|eos|>\n' }}{{ m.role }}: {{ m.content }}{% endfor %}" \
             "{% if add_generation_prompt %}<|eos|>\nassistant:{% endif %}"  # fmt: skip
    assert learned(source, said("q", "a", "r", "b")) == [" a<|eos|>", " b"]


def test_others_are_learned_by_their_content_and_what_ends_their_turn():
    messages = said(("system", " s "), ("user", "\n q"), ("assistant", "a"), ("tool", "{}"))
    everyone = [True] * 4
    assert learned(LLAMA3, messages, everyone) == ["s", "q", "a<|eot_id|>", "{}"]
    stops = Turns(ChatTemplate(LLAMA3, {}, origin="here"), SPECIAL, ["<|eot_id|>"])
    text, spans = stops.spans(messages, everyone)
    assert [text[start:end] for start, end in spans] == ["s<|eot_id|>", "q<|eot_id|>", "a<|eot_id|>", "{}<|eot_id|>"]
    with pytest.raises(BadRowError, match="message 1 cannot be masked: the chat template changes what it says"):
        learned("{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}", said("Q"), [True])


def test_a_token_across_the_start_of_a_turn_is_not_learned(tmp_path):
    # The prompt ends in the space that the word's token begins with, so at that place nothing can be generated.
    source = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<|eos|>' }}{% endfor %}" \
             "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"  # fmt: skip
    for trim_offsets in (True, False):
        folder = write_tokenizer(tmp_path / str(trim_offsets), source, trim_offsets=trim_offsets)
        tokenizer = TextTokenizer.load(folder)
        ids, targets = tokenizer.chat(said("hello", "the cat"))
        chosen = [tokenizer.decode([i]) for i, target in zip(ids, targets, strict=True) if target]
        assert tokenizer.encode(" the") == [i for i in ids if tokenizer.decode([i]) == " the"]
        assert "".join(chosen) == " cat<|eos|>"


def test_a_token_across_the_end_of_a_turn_is_learned(tmp_path):
    tokenizer = TextTokenizer.load(write_tokenizer(tmp_path))
    ids, targets = tokenizer.masked("dog the", [(1, 4)])  # the space of ` the` is in the span, the word is not
    assert (tokenizer.decode(ids[-1:]), targets[-1]) == (" the", True)


def test_the_first_token_is_never_learned(tmp_path):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _, targets = TextTokenizer.load(write_tokenizer(tmp_path, source)).chat(said(("assistant", "the cat")))
    assert targets[0] is False
    assert all(targets[1:])


def test_what_the_template_says_is_told():
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    with pytest.raises(BadRowError, match="refuses these messages: begin with the user"):
        learned(source, said(("assistant", "a")))
    with pytest.raises(BadRowError, match="refuses"):
        ChatTemplate("{{ messages[0].nothing.there }}", {}, origin="here").render(said("a"))


def test_templates_cannot_reach_out():
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(BadRowError):
            ChatTemplate(source, {}, origin="here").render(said("a"))


def test_a_broken_template_is_named():
    with pytest.raises(DataError, match=r"template: the one in here does not parse: line 1"):
        ChatTemplate("{% if %}", {}, origin="here")


def test_tools_are_refused_by_templates_that_do_not_write_them():
    messages = [*said("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="the rows have tools, which the chat template in here does not write; "
                                        "type template=llama3 or template=mistral or template=qwen, or leave"):  # fmt: skip
        learned(CHATML, said("q", "a"), tools=TOOLS)
    with pytest.raises(DataError, match="the rows have calls of tools, which the chat template in here does not write"):
        learned(CHATML, messages)
    assert learned(QWEN3, messages, tools=TOOLS)[0].endswith('"arguments": {"what": "a cat"}}\n</tool_call><|im_end|>')


def test_calls_as_they_come(tmp_path):
    for call in (CALL, CALL["function"], {"function": {"name": "weigh", "arguments": '{"what": "a cat"}'}}):
        messages = [
            *said("q"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            *said(("tool", "1"), ("assistant", "b")),
        ]
        assert learned(QWEN3, messages, tools=TOOLS)[0].startswith(
            '<tool_call>\n{"name": "weigh", "arguments": {"what": "a cat"}}'
        )
    for call in ({"name": "weigh", "arguments": "{"}, {"name": "weigh", "arguments": "1"}, {"arguments": {}}):
        with pytest.raises(BadRowError, match="message 2: "):
            learned(QWEN3, [*said("q"), {"role": "assistant", "tool_calls": [call]}])


def test_where_templates_lie(tmp_path):
    folder = write_tokenizer(tmp_path, None)
    with pytest.raises(
        DataError, match=r"model.path: .* has no chat template.*type template=alpaca or template=chatml"
    ):
        TextTokenizer.load(folder).chat([])

    def shown(tools=None):
        return TextTokenizer.load(folder)._turns(tools).template.render([])

    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert (shown(), shown(TOOLS)) == ("yes", "tools")
    before = TextTokenizer.load(folder).digest
    (folder / "chat_template.jinja").write_text("file")
    assert shown() == "file"
    assert TextTokenizer.load(folder).digest != before
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"tokenizer_config.json names no `eos_token` of the vocabulary, which the chat"
    ):
        TextTokenizer.load(folder).chat(said("q", "a"))
