from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.datasets.badrows import BadRowError, LeftOutError
from dtrain.datasets.base import Chat, Completion, Example, Judged, Labelled, Preference, Text
from dtrain.errors import ConfigError, DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.pretrain import Pretrain
from dtrain.objectives.sft import SFT


class Letters:
    """A tokenizer of one token per character."""

    eos_id, pad_id = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def masked(self, text, spans):
        return self.encode(text), [any(start <= i < end for start, end in spans) for i in range(len(text))]

    def chat(self, messages, learned, tools=None):
        ids, targets = [], []
        for message, one in zip(messages, learned, strict=True):
            ids += self.encode(message["content"])
            targets += [one] * len(message["content"])
        return ids, targets


TEXT = Text(source="a.txt:1", text="abc")
CHAT = Chat(source="b.jsonl:7", messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])


@pytest.mark.parametrize("objective", [Pretrain(), Auto()])
def test_every_token_of_a_text_but_the_first_is_a_target_and_so_is_its_end(objective):
    row = objective.encode(TEXT, Letters())
    assert row.tokens.tolist() == [97, 98, 99, 0]
    assert row.targets.tolist() == [False, True, True, True]
    assert row.lengths.tolist() == [4]
    assert (row.tokens.dtype, row.targets.dtype, row.lengths.dtype) == ("int32", "bool", "int32")
    assert row.num_targets == 3


def test_an_empty_text_has_no_target():
    assert Pretrain().encode(Text(source="a:1", text=""), Letters()).num_targets == 0


@pytest.mark.parametrize("objective", [SFT(), Auto()])
def test_what_the_assistant_says_is_a_target(objective):
    row = objective.encode(CHAT, Letters())
    assert row.tokens.tolist() == [ord(letter) for letter in "hiyes"]
    assert row.targets.tolist() == [False, False, True, True, True]
    assert row.lengths.tolist() == [5]


def test_the_first_token_is_never_a_target():
    row = SFT().encode(Chat(source="b:1", messages=[{"role": "assistant", "content": "yes"}]), Letters())
    assert row.targets.tolist() == [False, True, True]


def test_rows_of_the_other_shape_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"b.jsonl:7: a chat row.*objective=sft"):
        Pretrain().encode(CHAT, Letters())
    with pytest.raises(DataError, match=r"a.txt:1: a text row.*objective=pretrain"):
        SFT().encode(TEXT, Letters())


def test_auto_goes_by_the_shape():
    assert isinstance(Auto().resolve(Text), Pretrain)
    assert isinstance(Auto().resolve(Chat), SFT)
    assert Pretrain().resolve(Chat) == Pretrain()
    with pytest.raises(DataError, match="Example"):
        Auto().resolve(Example)


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def learned(row):
    return "".join(
        chr(token) for token, target in zip(row.tokens.tolist(), row.targets.tolist(), strict=True) if target
    )


STEPS = said(
    ("system", "s"),
    ("user", "u"),
    ("assistant", "a"),
    ("user", "v"),
    ("assistant", "b"),
    ("tool", "t"),
    ("assistant", "c"),
)


@pytest.mark.parametrize(("train_on", "expected"), [
    ("assistant", "abc"), ("last_turn", "bc"), ("all", "uavbtc"), (["user", "tool"], "uvt"), ({"roles": ["tool"]}, "t"),
])  # fmt: skip
def test_whose_messages_are_learned(train_on, expected):
    assert learned(SFT(train_on=train_on).encode(Chat("a:1", STEPS), Letters())) == expected  # the first is never one
    assert learned(Auto(train_on=train_on).encode(Chat("a:1", STEPS), Letters())) == expected


def test_a_message_decides_for_itself():
    messages = [{**message} for message in STEPS]
    messages[2]["train"], messages[3]["train"], messages[4]["train"] = False, True, None
    assert learned(SFT().encode(Chat("a:1", messages), Letters())) == "vbc"
    for message in messages:
        message["train"] = False
    with pytest.raises(BadRowError, match="no message to learn"):
        SFT(train_on="all").encode(Chat("a:1", messages), Letters())


def test_the_last_turn_ends_with_the_assistant():
    assert learned(SFT(train_on="last_turn").encode(Chat("a:1", STEPS[:4]), Letters())) == "a"
    with pytest.raises(
        BadRowError, match="no message to learn: objective.train_on=last_turn, and the roles are system, user"
    ):
        SFT(train_on="last_turn").encode(Chat("a:1", STEPS[:2]), Letters())


def test_a_row_without_a_target_is_bad():
    for row in (Chat("a:1", said(("user", "u"), ("assistant", ""))), Chat("a:1", said(("assistant", "a"))),
                Completion("a:1", "", "")):  # fmt: skip
        with pytest.raises(BadRowError, match="no token to learn"):
            SFT().encode(row, Letters())


@pytest.mark.parametrize("objective", [SFT(), Auto()])
def test_of_an_answer_only_the_answer_is_learned(objective):
    row = objective.encode(Completion("a:1", "q: ", "yes"), Letters())
    assert row.tokens.tolist() == [*map(ord, "q: yes"), Letters.eos_id]
    assert row.targets.tolist() == [False] * 3 + [True] * 4
    assert objective.encode(Completion("a:1", "", "yes"), Letters()).targets.tolist() == [False, True, True, True]
    assert objective.encode(Completion("a:1", "q", ""), Letters()).targets.tolist() == [False, True]
    row = objective.encode(Labelled("a:1", "a film", "good"), Letters())
    assert learned(row) == "good" + chr(Letters.eos_id)
    assert row.tokens.tolist() == [*map(ord, "a film\ngood"), Letters.eos_id]


@pytest.mark.parametrize("objective", [SFT(), Auto(), SFT(train_on="last_turn")])
def test_of_replies_the_chosen_and_good_ones_are_learned(objective):
    before, reply, other = STEPS[:4], said(("assistant", "yes")), said(("assistant", "no"))
    assert learned(objective.encode(Preference("a:1", before, reply, other), Letters())) == "yes"
    assert learned(objective.encode(Judged("a:1", before, reply, good=True), Letters())) == "yes"
    with pytest.raises(LeftOutError, match="judged as not good"):
        objective.encode(Judged("a:1", before, reply, good=False), Letters())


def test_what_is_done_instead_is_told():
    for shape, words in ((Labelled, "label is learned"), (Preference, "chosen replies"), (Judged, "judged as good")):
        (note,) = Auto().resolve(shape).notes(shape)
        assert words in note
        assert note.endswith("another objective for such rows is not there yet")
    assert SFT().notes(Chat) == SFT().notes(Completion) == Pretrain().notes(Text) == []


def test_a_choice_of_messages_where_there_are_none():
    with pytest.raises(DataError, match="objective.train_on=all: the rows are texts, of which all is learned"):
        Auto(train_on="all").resolve(Text)


def test_train_on_as_it_is_typed():
    from dtrain.config import frozen
    from dtrain.plan.propose import configure

    for typed, value in (("[user,tool]", ("user", "tool")), ("{roles:[tool]}", ("tool",)), ("last_turn", "last_turn")):
        for choice in ("sft", "auto"):
            config, _ = configure([f"objective={choice}", f"objective.train_on={typed}"], None)
            assert config.objective.train_on == value
            assert frozen.to_plain(config)["objective"]["train_on"] in (value, list(value))
    for typed, words in (("user", "not one of 'assistant', 'last_turn' or 'all' and not a list"), ("[]", "no role")):
        with pytest.raises(ConfigError, match=words):
            configure([f"objective.train_on={typed}"], None)


@pytest.mark.parametrize("objective", [Pretrain(), SFT(), Auto()])
def test_the_loss_is_what_the_module_gives_and_counts_the_targets(objective):
    class Sum(nn.Module):
        def forward(self, tokens, target_ids):
            return tokens.sum() + target_ids.sum()

    batch = Batch({"tokens": torch.tensor([1, 2]), "target_ids": torch.tensor([4])}, 1, 2, [0])
    loss = objective.build()(Sum(), batch)
    assert (loss.total.item(), loss.num_targets, dict(loss.extras)) == (7, 1, {})
