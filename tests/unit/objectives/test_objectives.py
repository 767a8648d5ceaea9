from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.data.batch import Batch
from dtrain.datasets.base import Chat, Example, Text
from dtrain.errors import DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.pretrain import Pretrain
from dtrain.objectives.sft import SFT


class Letters:
    """A tokenizer of one token per character."""

    eos_id, pad_id = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]

    def chat(self, messages):
        ids, targets = [], []
        for message in messages:
            ids += self.encode(message["content"])
            targets += [message["role"] == "assistant"] * len(message["content"])
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


@pytest.mark.parametrize("objective", [Pretrain(), SFT(), Auto()])
def test_the_loss_is_what_the_module_gives_and_counts_the_targets(objective):
    class Sum(nn.Module):
        def forward(self, tokens, target_ids):
            return tokens.sum() + target_ids.sum()

    batch = Batch({"tokens": torch.tensor([1, 2]), "target_ids": torch.tensor([4])}, 1, 2, [0])
    loss = objective.build()(Sum(), batch)
    assert (loss.total.item(), loss.num_targets, dict(loss.extras)) == (7, 1, {})
