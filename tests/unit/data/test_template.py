"""The template that is chosen is the one in the model's folder, and so the one that is exported."""

import json

import pytest

from dtrain.config.compose import group_choice
from dtrain.config.spec import spec
from dtrain.config.validate import validate_spec
from dtrain.data.prepare import prepare
from dtrain.data.template import describe, has_template, with_template
from dtrain.data.tokenizer import TextTokenizer, stop_ids
from dtrain.datasets.base import AbstractRows, Chat, Completion, Judged, Preference, Text
from dtrain.errors import ConfigError, DataError
from dtrain.models.assets import copy_assets
from dtrain.objectives.auto import Auto
from dtrain.objectives.sft import SFT
from dtrain.plan.propose import configure, propose
from dtrain.templates.jinja import Jinja
from tests.unit.data.fakes import CHATML, SPECIAL, FakeModel, write_tokenizer

MESSAGES = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the cat"}]


def named(name):
    return validate_spec("template", group_choice("template", name))


def own(folder, template=None, stops=(), **config):
    write_tokenizer(folder, template, **config)
    (folder / "generation_config.json").unlink()
    if stops:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops), "top_k": 3}))
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_named_template_is_in_the_folder_and_in_what_is_exported(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    before = own(tmp_path / "own", "something else", stops=[0])
    found = with_template(before, named("chatml"), tmp_path / "cache")
    assert with_template(before, named("chatml"), tmp_path / "cache") == found
    copy_assets(found, tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported", tokenizer_type="qwen2")
    assert theirs.chat_template == named("chatml").text
    assert theirs.apply_chat_template(MESSAGES, tokenize=False).endswith("<|im_start|>assistant\nthe cat<|im_end|>\n")
    stops = GenerationConfig.from_pretrained(tmp_path / "exported")
    assert (stops.eos_token_id, stops.top_k) == ([0, SPECIAL.index("<|im_end|>")], 3)
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert "something else" in (before / "tokenizer_config.json").read_text()  # the model's folder is not written to
    assert stop_ids(before) == [0]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    spec = propose([f"template.file={path}"], None).config.template
    assert (spec.name, spec.text, spec.file) == (str(path), CHATML, None)
    found = with_template(own(tmp_path / "own"), spec, tmp_path / "cache")
    assert stop_ids(found) == [0, SPECIAL.index("<|im_end|>")]  # found by looking
    path.write_text(CHATML + " ")
    assert (
        with_template(tmp_path / "own", propose([f"template.file={path}"], None).config.template, tmp_path / "cache")
        != found
    )


@pytest.mark.parametrize(("typed", "said"), [
    (["template.file=nowhere.jinja"], "template.file=nowhere.jinja: no such file"),
    (["template.file=EMPTY"], "EMPTY: empty; give a Jinja template"),
    (["template.file=BYTES"], "BYTES: cannot be read"),
    (["template=chatml", "template.file=EMPTY"], "EMPTY: template=chatml is one already; leave one of them out"),
    (["template=chatmll"], "template=chatmll: no such choice; did you mean `chatml`?"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, typed, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError) as caught:
        propose(typed, None)
    assert said in str(caught.value)


def test_the_tokenizers_own_stays_as_it_is(tmp_path):
    assert with_template(own(tmp_path / "none"), Jinja(), tmp_path / "cache") == tmp_path / "none"
    right = own(tmp_path / "right", CHATML, stops=[0, 3])
    for _ in range(2):
        assert with_template(right, Jinja(), tmp_path / "cache") == right


def test_generation_stops_where_turns_end(tmp_path):
    before = own(tmp_path / "own", CHATML)  # a base model, whose generation stops only where texts end
    found = with_template(before, Jinja(), tmp_path / "cache")
    assert stop_ids(found) == [0, SPECIAL.index("<|im_end|>")]
    assert (found / "tokenizer_config.json").read_text() == (before / "tokenizer_config.json").read_text()
    lines = describe(before, found, Jinja(), TextTokenizer.load(found), used=True)
    assert lines == ["template: the tokenizer's own",
                     "template: generation of the exported model stops at <|im_end|> too"]  # fmt: skip
    chosen = with_template(before, Jinja(ends=("<|eot_id|>",)), tmp_path / "cache")
    assert stop_ids(chosen) == [0, SPECIAL.index("<|eot_id|>")]


def test_a_token_that_the_tokenizer_lacks(tmp_path):
    before = own(tmp_path / "own")
    spec = Jinja(
        name="mine",
        text=CHATML.replace("<|im_end|>", "<|over|>").replace("<|im_start|>", "<|begin|>"),
        ends=("<|over|>",),
    )
    with pytest.raises(DataError) as caught:
        with_template(before, spec, tmp_path / "cache")
    assert "template=mine: ends a turn with <|over|>, which is no token of this model" in str(caught.value)
    assert "type template=alpaca or template=chatml or template=gemma or template=llama3" in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())
    # In pieces where no turn ends with it, and told.
    found = with_template(before, named("mistral"), tmp_path / "cache")
    tokenizer = TextTokenizer.load(found)
    assert describe(before, found, named("mistral"), tokenizer, used=True)[:2] == [
        "template: mistral",
        "template: the tokenizer has no such tokens and takes them in pieces: [INST], [/INST], [AVAILABLE_TOOLS], "
        "[/AVAILABLE_TOOLS], [TOOL_CALLS], [TOOL_RESULTS], [/TOOL_RESULTS]",
    ]
    assert len(tokenizer.encode("[INST]")) > 1
    with pytest.raises(DataError, match="template.ends: the tokenizer has no chat template"):
        with_template(before, Jinja(ends=("x",)), tmp_path / "cache")


def test_a_tokenizer_without_an_end_of_text(tmp_path):
    before = own(tmp_path / "own")
    (before / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="template=plain: ends a turn with eos_token, which is no token of this model"):
        with_template(before, named("plain"), tmp_path / "cache")
    config = {
        "eos_token": "<nowhere>",
        "chat_template": "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}",
    }
    (before / "tokenizer_config.json").write_text(json.dumps(config))
    assert with_template(before, Jinja(), tmp_path / "cache") == before  # texts can be read all the same
    with pytest.raises(DataError, match=r"own/tokenizer_config.json names no `eos_token` of the vocabulary"):
        TextTokenizer.load(before).chat(MESSAGES)


def test_a_template_that_does_not_parse_is_named(tmp_path):
    before = own(tmp_path / "own", "{% for %}")
    with pytest.raises(DataError, match=r"template: the one in .*/own/tokenizer_config.json does not parse: line 1"):
        with_template(before, Jinja(), tmp_path / "cache")
    with pytest.raises(DataError, match=r"template: the one in mine.jinja does not parse: line 1"):
        with_template(before, Jinja(name="mine.jinja", text="{% for %}"), tmp_path / "cache")


def test_what_is_printed(tmp_path):
    before = own(tmp_path / "own", CHATML)
    found = with_template(before, named("plain"), tmp_path / "cache")
    tokenizer = TextTokenizer.load(found)
    assert has_template(before)
    assert (
        describe(before, found, named("plain"), tokenizer, used=True)[0]
        == "template: plain, in place of the tokenizer's own"
    )
    lines = describe(before, found, named("plain"), tokenizer, used=False)
    assert lines[1] == "template: not used here, as the rows are no conversations"
    assert describe(before, before, Jinja(), tokenizer, used=False) == []


def test_the_run_has_the_text_whatever_becomes_of_the_file(tmp_path):
    from dtrain.config import frozen

    path = tmp_path / "mine.jinja"
    path.write_text("{%- for m in messages %}\n  {{ m.content }} ß \n{% endfor %}\n")
    config = propose([f"template.file={path}", "run.name=x"], None).config
    path.unlink()
    frozen.write(tmp_path / "config.yaml", config)
    assert frozen.read(tmp_path / "config.yaml", plugins=()) == config
    assert frozen.digest(config) != frozen.digest(configure(["run.name=x"], None)[0])


@spec
class Given(AbstractRows):
    """The rows that a test has written down."""

    shape: str
    kinds = {"chat": Chat, "text": Text, "judged": Judged, "completion": Completion, "preference": Preference}  # noqa: RUF012
    rows = {}  # noqa: RUF012

    def examples(self):
        for i, row in enumerate(self.rows[self.shape]):
            yield self.kinds[self.shape](f"a:{i + 1}", **row)

    def digest(self):
        return json.dumps(self.rows[self.shape])


def prepared(shape, rows, cache, said=None, template=None, model=None, objective=None, **values):
    Given.rows[shape] = rows
    return prepare(Given(shape=shape, max_length=values.pop("max_length", 64), **values), objective or Auto(), model or FakeModel(), template or Jinja(),
                   eval_fraction=0.0, seed=0, cache=cache, say=([] if said is None else said).append)  # fmt: skip


def chats(*answers):
    return [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


def test_a_chat_cut_within_an_answer_is_counted(tmp_path):
    rows = chats("the cat", "the dog")
    rows[0]["messages"] += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat " * 99}]
    done = prepared("chat", rows, tmp_path)
    tokenizer = TextTokenizer.load(done.assets)
    ids, targets = tokenizer.chat(rows[0]["messages"])
    assert targets[63:65] == [True, True]
    assert done.counts == {
        "read": 2, "truncated to 64 tokens": 1, "tokens cut off": len(ids) - 64,
        "of these to be learned": sum(targets[64:]), "cut within what is learned": 1,
    }  # fmt: skip
    assert sum(targets[64:]) == len(ids) - 64 - 1  # all but the new line behind the last turn
    exact = len(tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>"))
    done = prepared("chat", rows[:1], tmp_path, max_length=exact)
    assert "cut within what is learned" not in done.counts  # a turn is over where the row is
    done = prepared("chat", rows[:1], tmp_path, max_length=exact - 1)
    assert done.counts["cut within what is learned"] == 1  # but for the token that ends it


def test_judged_rows_that_are_left_out_are_counted(tmp_path):
    question, answer = chats("the cat")[0]["messages"]
    rows = [{"prompt": [question], "completion": [answer], "good": i > 1} for i in range(5)]
    done = prepared("judged", rows, tmp_path, objective=SFT())
    assert done.counts == {"read": 5, "left out: judged as not good": 2}
    assert done.objective == SFT()
    assert done.notes == [
        "template: the tokenizer's own",
        "objective: sft: the replies judged as good are learned, the others left out; objective=kto looks at all of such "
        "a row",
    ]
    assert done.lines()[:2] == done.notes


def test_the_template_is_in_the_key_and_in_the_models_folder(tmp_path):
    said = []
    first = prepared("chat", chats("the cat", "the dog"), tmp_path, said)
    template = Jinja(name="mine", text=CHATML + "{# mine #}", ends=("<|im_end|>",))
    second = prepared("chat", chats("the cat", "the dog"), tmp_path, said, template)
    assert "template.name was auto, is mine" in said[-1]
    assert "text of the template changed" in said[-1]
    assert second.notes[0] == "template: mine, in place of the tokenizer's own"
    assert (second.assets / "chat_template.jinja").read_text() == template.text
    assert second.digest == first.digest  # it writes the same
    texts = prepared("text", [{"text": "the cat"}], tmp_path, template=template)
    assert texts.notes[-1] == "template: not used here, as the rows are no conversations"


def test_the_tiny_models_own_template_writes_tools(tmp_path):
    from dtrain.models.tiny import Tiny

    folder = Tiny(vocab=300).assets(lambda: ["the cat sat on the mat"], tmp_path)
    call = {"function": {"name": "weigh", "arguments": {}}}
    messages = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = TextTokenizer.load(folder)
    ids, targets = tokenizer.chat(messages, None, [{"type": "function", "function": {"name": "weigh"}}])
    learned = tokenizer.decode([i for i, target in zip(ids, targets, strict=True) if target])
    assert learned == '<tool_call>\n{"name": "weigh", "arguments": {}}\n</tool_call><|im_end|>'
    assert tokenizer.chat_notes() == []
    assert with_template(folder, Jinja(), tmp_path) == folder


def test_answers_need_no_template(tmp_path):
    done = prepared(
        "completion", [{"prompt": "the cat", "completion": " sat"}], tmp_path, model=FakeModel(template=None)
    )
    assert done.notes == []
    assert done.num_targets == len(TextTokenizer.load(done.assets).encode(" sat")) + 1
