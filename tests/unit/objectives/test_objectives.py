from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.datasets.badrows import BadRowError, LeftOutError
from dtrain.datasets.base import Chat, Completion, Example, Judged, Labelled, Preference, Text
from dtrain.errors import ConfigError, DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.classify import Classify
from dtrain.objectives.dpo import DPO
from dtrain.objectives.kto import KTO
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
    assert Auto(train_on="all").resolve(Preference) == DPO(train_on="all")
    assert Auto().resolve(Judged) == KTO()
    assert Auto().resolve(Labelled) == Classify()
    assert Auto().among([Text, Chat]) == Auto()
    with pytest.raises(DataError, match="rows of preference and judged, which are not learned by one loss"):
        Auto().among([Preference, Judged])
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
    row = SFT().encode(Labelled("a:1", "a film", "good"), Letters())
    assert learned(row) == "good" + chr(Letters.eos_id)
    assert row.tokens.tolist() == [*map(ord, "a film\ngood"), Letters.eos_id]


@pytest.mark.parametrize("objective", [SFT(), SFT(train_on="last_turn")])
def test_of_replies_the_chosen_and_good_ones_are_learned(objective):
    before, reply, other = STEPS[:4], said(("assistant", "yes")), said(("assistant", "no"))
    assert learned(objective.encode(Preference("a:1", before, reply, other), Letters())) == "yes"
    assert learned(objective.encode(Judged("a:1", before, reply, good=True), Letters())) == "yes"
    with pytest.raises(LeftOutError, match="judged as not good"):
        objective.encode(Judged("a:1", before, reply, good=False), Letters())


def test_what_is_done_instead_is_told():
    for shape, words, other in ((Labelled, "label is learned", "classify"), (Preference, "chosen replies", "dpo, simpo"),
                                (Judged, "judged as good", "kto")):  # fmt: skip
        (note,) = SFT().notes(shape)
        assert words in note
        assert f"; objective={other}" in note
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


PROMPT = said(("user", "hi"))
PAIR = Preference("a.jsonl:3", PROMPT, said(("assistant", "yes")), said(("assistant", "no")))


@pytest.mark.parametrize("objective", [DPO(), Auto()])
def test_a_pair_is_two_documents_of_which_the_replies_are_learned(objective):
    row = objective.encode(PAIR, Letters())
    assert row.tokens.tolist() == [*map(ord, "hiyes"), *map(ord, "hino")]
    assert row.targets.tolist() == [False, False, True, True, True, False, False, True, True]
    assert row.lengths.tolist() == [5, 4]


def test_a_pair_of_the_same_reply_is_left_out():
    with pytest.raises(LeftOutError, match="the same"):
        DPO().encode(Preference("a:1", PROMPT, said(("assistant", "no")), said(("assistant", "no"))), Letters())


@pytest.mark.parametrize(("objective", "words"), [(DPO(), "columns `chosen` and `rejected`"), (KTO(), "`label`")])
def test_rows_that_are_no_replies_are_refused_with_what_is_needed(objective, words):
    with pytest.raises(DataError, match=f"b.jsonl:7: a chat row, and objective=.*{words}"):
        objective.encode(CHAT, Letters())


def test_label_smoothing_goes_with_one_loss():
    assert DPO(label_smoothing=0.1).problems() == []
    assert "objective.loss=sigmoid" in DPO(label_smoothing=0.1, loss="ipo").problems()[0]


def judged(prompt, reply, *, good=True):
    return Judged(f"a:{ord(reply[0])}", said(("user", prompt)), said(("assistant", reply)), good=good)


def test_a_judged_reply_comes_with_one_that_was_given_to_something_else():
    # The first two answer the same, so both take the third's; the last takes that of the first.
    rows = KTO().together([judged("p", "a"), judged("p", "b", good=False), judged("q", "c"), judged("r", "d")])
    encoded = [KTO().encode(row, Letters()) for row in rows]
    assert ["".join(map(chr, row.tokens)) for row in encoded] == ["papc", "pbpc", "qcqd", "rdra"]
    assert [row.labels.tolist() for row in encoded] == [[1], [0], [1], [1]]
    assert [row.lengths.tolist() for row in encoded] == [[2, 2]] * 4
    (alone,) = KTO().together([judged("p", "a")])
    assert KTO().encode(alone, Letters()).lengths.tolist() == [2, 2]


FILM = Labelled("films.csv:2", "a film", "good")


def test_a_label_is_what_comes_after_the_text():
    row = Classify(labels=("bad", "good")).encode(FILM, Letters())
    assert "".join(map(chr, row.tokens)) == "a film\ngood\0"
    assert learned(row) == "good\0"
    assert row.labels.tolist() == [1]


def test_labels_are_found_in_the_data():
    films = [FILM, Labelled("films.csv:3", "b", "bad"), FILM]
    assert Classify().settle(iter(films)) == {"labels": ["bad", "good"]}
    assert Classify(labels=("x", "y")).settle(iter(films)) == {}
    with pytest.raises(DataError, match="all rows have one label, 'good'"):
        Classify().settle(iter([FILM]))
    with pytest.raises(DataError, match=r"a:1000: more than 1,000 different labels.*objective=sft"):
        Classify().settle(Labelled(f"a:{i}", "t", str(i)) for i in range(2000))


def test_labels_that_cannot_be():
    with pytest.raises(BadRowError, match="not one of objective.labels: 'good'; there are: bad, fine"):
        Classify(labels=("bad", "fine")).encode(FILM, Letters())
    with pytest.raises(DataError, match="b.jsonl:7: a chat row, and objective=classify"):
        Classify(labels=("bad", "fine")).encode(CHAT, Letters())
    assert "bad named twice" in Classify(labels=("bad", "bad")).problems()[0]
    assert "one label" in Classify(labels=("bad",)).problems()[0]


def test_scores_of_a_confusion_matrix():
    # 3 of 4 right. F1: a: 2*2/(2+3) = 0.8, b: 2*1/(2+1) = 2/3; c occurs nowhere.
    found = Classify(labels=("a", "b", "c")).metrics({"confusion": [2, 0, 0, 1, 1, 0, 0, 0, 0]}, 4)
    assert found == pytest.approx({"accuracy": 0.75, "macro_f1": (0.8 + 2 / 3) / 2})


def test_every_label_is_tried_after_each_text():
    from dtrain.objectives._classes import Candidates, with_prompts
    from dtrain.objectives._documents import part

    spec = Classify(labels=("x", "yy"))
    rows = [spec.encode(Labelled("a:1", text, label), Letters()) for text, label in (("one", "yy"), ("a", "x"))]
    batch = with_prompts(rows, [3, 4], 1)
    candidates = Candidates([[120, 0], [121, 121, 0]], 1)
    assert candidates([batch], held_out=False) == [batch]
    (seen,) = candidates([batch], held_out=True)
    texts = [["".join(map(chr, row)) for row in part(seen, f"label-{k}.").inputs["tokens"].tolist()] for k in (0, 1)]
    assert texts == [["one\nx\0", "a\nx\0\1\1"], ["one\nyy\0", "a\nyy\0\1\1"]]
