"""Conversations and answers: what the assistant says is learned, the rest is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.badrows import BadRowError, LeftOutError
from dtrain.datasets.base import Chat, Completion, Example, Judged, Labelled, Messages, Preference, Tools
from dtrain.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.objectives.base import Loss


def _roles(value: object) -> object:
    return value["roles"] if isinstance(value, Mapping) and list(value) == ["roles"] else value


TrainOn = Annotated[Literal["assistant", "last_turn", "all"] | tuple[str, ...], BeforeValidator(_roles)]

_INSTEAD: Mapping[type[Example], tuple[str, str]] = {
    Labelled: ("the text and a new line are read, the label is learned", "classify"),
    Preference: ("the chosen replies are learned, the rejected ones not looked at", "dpo, simpo, orpo or reward"),
    Judged: ("the replies judged as good are learned, the others left out", "kto"),
}
"""Of shapes that other objectives make more of: what is done with them here, and the others."""


@spec
class SFT(ObjectiveSpec):
    train_on: TrainOn = "assistant"
    """Whose messages are learned, each with the token that ends its turn: the assistant's; only those of its last turn,
    after the last message of the user; all; or those of a list of roles. A message that has `train` decides itself."""

    def problems(self) -> list[str]:
        return [] if self.train_on else ["objective.train_on=[]: no role; name at least one, or type assistant"]

    def notes(self, shape: type[Example]) -> list[str]:
        said = _INSTEAD.get(shape)
        return [] if said is None else [f"objective: sft: {said[0]}; objective={said[1]} looks at all of such a row"]

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        if isinstance(example, Completion):
            return _answer(example.prompt, example.completion, tokenizer)
        if isinstance(example, Labelled):
            return _answer(f"{example.text}\n", example.label, tokenizer)
        if isinstance(example, Chat):
            return self.reply([], example.messages, example.tools, tokenizer)
        if isinstance(example, Preference):
            return self.reply(example.prompt, example.chosen, example.tools, tokenizer)
        if isinstance(example, Judged):
            if not example.good:
                raise LeftOutError("judged as not good")
            return self.reply(example.prompt, example.completion, example.tools, tokenizer)
        raise DataError(f"{example.source}: a {type(example).__name__.lower()} row, and objective=sft learns "
                        f"conversations and answers; use objective=pretrain, or a dataset of these")  # fmt: skip

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from dtrain.objectives.base import causal_loss

        return causal_loss

    def reply(self, prompt: Messages, reply: Messages, tools: Tools | None, tokenizer: TextTokenizer) -> Row:
        """`prompt`: what comes before a reply that was looked at by itself, so that only the reply is learned."""
        messages = [*prompt, *reply]
        chosen = [*(False for _ in prompt), *_chosen([message["role"] for message in reply], self.train_on)]
        learned = [one if message.get("train") is None else bool(message["train"])
                   for message, one in zip(messages, chosen, strict=True)]  # fmt: skip
        if not any(learned):
            raise BadRowError(f"no message to learn: objective.train_on={self.train_on}, and the roles are "
                              f"{', '.join(message['role'] for message in messages) or 'none'}")  # fmt: skip
        return _row(*tokenizer.chat(messages, learned, tools))


def _chosen(roles: Sequence[str], train_on: str | tuple[str, ...]) -> list[bool]:
    if train_on == "all":
        return [True] * len(roles)
    if train_on != "last_turn":
        return [role == train_on or (isinstance(train_on, tuple) and role in train_on) for role in roles]
    end = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0)
    start = max((i for i, role in enumerate(roles[:end]) if role == "user"), default=-1)
    return [start < i < end and role == "assistant" for i, role in enumerate(roles)]


def _answer(prompt: str, completion: str, tokenizer: TextTokenizer) -> Row:
    """The second text is learned, and the token that ends a text."""
    ids, targets = tokenizer.masked(prompt + completion, [(len(prompt), len(prompt + completion))])
    return _row([*ids, tokenizer.eos_id], [*targets, bool(ids)])


def _row(ids: Sequence[int], learned: Sequence[bool]) -> Row:
    import numpy as np  # not at the top: `dtrain plan` imports this file and needs no arrays

    from dtrain.data.rows import Row

    tokens, targets = np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=np.bool_)
    targets[:1] = False
    if not targets.any():
        raise BadRowError("no token to learn: what is learned has no text, or only the first token of the row")
    return Row(tokens=tokens, targets=targets, lengths=np.asarray([len(tokens)], dtype=np.int32))
