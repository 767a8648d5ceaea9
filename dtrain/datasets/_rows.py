"""From one row, as a file has it, to an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain.datasets._messages import Names, in_order, read_tools, with_system
from dtrain.datasets._shapes import Layout
from dtrain.datasets._values import filled, from_json, kind, listed, optional, string
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Chat, Completion, Example, Judged, Labelled, Messages, Preference, Text


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """How rows become examples."""

    layout: Layout
    names: Names
    labels: Sequence[str] = ()
    """Those that there may be; any where none is named."""

    def example(self, source: str, row: Mapping[str, Any]) -> Example:
        """Raises BadRowError."""
        missing = [name for name in self.layout.needed if name not in row]
        if missing:
            raise BadRowError(f"no {listed(missing)}: the rows are read as {self.layout.form.name} "
                              f"({self.layout.text}), and this one has {listed(row)}")  # fmt: skip
        return _MAKE[self.layout.form.name](self, source, row)

    def get(self, row: Mapping[str, Any], part: str) -> Any:
        """Null where there is no such column or value."""
        name = self.layout.columns.get(part)
        return None if name is None else row.get(name)

    def name(self, part: str) -> str:
        return f"`{self.layout.columns.get(part, part)}`"

    def filled(self, row: Mapping[str, Any], part: str) -> str:
        return filled(self.get(row, part), self.name(part))

    def said(self, row: Mapping[str, Any], part: str) -> Messages:
        """The messages in a column."""
        return self.names.read(self.get(row, part), self.layout.columns[part])

    def asked(self, row: Mapping[str, Any], part: str) -> Messages:
        """All turns up to the reply: the system's, those of the history, and the user's question with its input."""
        question, more = (
            optional(self.get(row, part), self.name(part)),
            optional(self.get(row, "input"), self.name("input")),
        )
        asked = "\n".join(each for each in (question, more) if each.strip())
        if not asked:
            raise BadRowError(f"{self.name(part)} is empty")
        before: Messages = []
        history = from_json(self.get(row, "history") or [], self.name("history"))
        if not isinstance(history, list):
            raise BadRowError(f"{self.name('history')} is {kind(history)} instead of a list")
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadRowError(
                    f"{self.name('history')} holds something else than pairs of a question and its answer"
                )
            for role, text in zip(("user", "assistant"), pair, strict=True):
                before.append({"role": role, "content": string(text, f"a turn in {self.name('history')}")})
        return with_system(self._system(row), [*before, {"role": "user", "content": asked}])

    def with_system(self, row: Mapping[str, Any], messages: Messages) -> Messages:
        return with_system(self._system(row), messages)

    def _system(self, row: Mapping[str, Any]) -> str:
        value = self.get(row, "system")
        return optional(value, self.name("system")) if value else ""


def _text(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    return Text(source, reading.filled(row, "text"))


def _completion(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    if isinstance(reading.get(row, "completion"), str):
        return Completion(source, string(reading.get(row, "prompt"), reading.name("prompt")),
                          reading.filled(row, "completion"))  # fmt: skip
    # What the assistant said in the prompt is not the completion.
    before = [message | {"train": False} if message["role"] == "assistant" else message
              for message in reading.said(row, "prompt")]  # fmt: skip
    messages = reading.with_system(row, [*before, *reading.said(row, "completion")])
    return Chat(source, in_order(messages), read_tools(reading.get(row, "tools")))


def _messages(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    messages = reading.with_system(row, reading.said(row, "messages"))
    return Chat(source, in_order(messages), read_tools(reading.get(row, "tools")))


def _asked(question: str, answer: str) -> Callable[[Reading, str, Mapping[str, Any]], Example]:
    def make(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
        reply = {"role": "assistant", "content": reading.filled(row, answer)}
        messages = [*reading.asked(row, question), reply]
        return Chat(source, in_order(messages), read_tools(reading.get(row, "tools")))

    return make


def _classification(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    label = reading.get(row, "label")
    if not isinstance(label, str | int):
        raise BadRowError(f"{reading.name('label')} is {kind(label)} instead of a label: a string or a whole number")
    label = filled(str(label), reading.name("label"))
    if reading.labels and label not in reading.labels:
        raise BadRowError(f"a label that is not in dataset.labels: `{label}`; there are {listed(reading.labels)}")
    return Labelled(source, reading.filled(row, "text"), label)


def _preference(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    chosen, rejected = (_reply(reading, row, part) for part in ("chosen", "rejected"))
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":  # whole conversations
        same = next((i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
                    min(len(chosen), len(rejected)))  # fmt: skip
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        prompt = reading.with_system(row, prompt)
    else:
        prompt = _prompt(reading, row)
    if chosen == rejected:
        raise BadRowError(f"{reading.name('chosen')} and {reading.name('rejected')} are the same")
    if not (chosen and rejected):
        raise BadRowError(
            f"one of {reading.name('chosen')} and {reading.name('rejected')} is the beginning of the other"
        )
    in_order([*prompt, *chosen])
    in_order([*prompt, *rejected])
    return Preference(source, prompt, chosen, rejected, read_tools(reading.get(row, "tools")))


def _kto(reading: Reading, source: str, row: Mapping[str, Any]) -> Example:
    good, name = reading.get(row, "label"), reading.name("label")
    good = {"true": True, "false": False, "1": True, "0": False}.get(str(good).lower())
    if good is None:
        raise BadRowError(f"{name} is neither true nor false: {reading.get(row, 'label')!r}")
    if "messages" in reading.layout.columns:
        messages = reading.with_system(row, reading.said(row, "messages"))
        prompt, completion = messages[:-1], messages[-1:]
    else:
        part = "completion" if "completion" in reading.layout.columns else "answer"
        prompt, completion = _prompt(reading, row), _reply(reading, row, part)
    if completion[-1]["role"] != "assistant":
        raise BadRowError("the last turn is not the assistant's, so the verdict is on nothing")
    in_order([*prompt, *completion])
    return Judged(source, prompt, completion, good, read_tools(reading.get(row, "tools")))


def _prompt(reading: Reading, row: Mapping[str, Any]) -> Messages:
    part = next((part for part in ("prompt", "question", "messages") if part in reading.layout.columns), None)
    if part is None:
        raise BadRowError(
            "nothing that is replied to: name a column as prompt, question or messages in dataset.columns"
        )
    if isinstance(reading.get(row, part), list):
        return reading.with_system(row, reading.said(row, part))
    return reading.asked(row, part)


def _reply(reading: Reading, row: Mapping[str, Any], part: str) -> Messages:
    """A string is the assistant's."""
    value = reading.get(row, part)
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": "assistant", "content": reading.filled(row, part)}]
    return reading.said(row, part)


_MAKE: Mapping[str, Callable[[Reading, str, Mapping[str, Any]], Example]] = {
    "text": _text, "completion": _completion, "messages": _messages, "alpaca": _asked("instruction", "output"),
    "qa": _asked("question", "answer"), "classification": _classification, "preference": _preference, "kto": _kto,
}  # fmt: skip
