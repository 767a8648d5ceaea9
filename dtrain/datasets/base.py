"""The shapes that a dataset yields: few, typed, each knows its place in a file; and what all datasets can be told."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from dtrain.config.spec import DatasetSpec, OnBadRow, OnLong, spec

Messages = list[dict[str, Any]]
"""A conversation in order. Each has `role` and `content`: a text, or null beside `tool_calls`. It may have `tool_calls`
(each `{"type": "function", "function": {"name": ..., "arguments": {...}}}`), `name`, `tool_call_id`, and `train`:
whether it is learned, whatever the objective says. Roles are as the chat template knows them."""
Tools = list[dict[str, Any]]
"""Functions that the assistant may call, as JSON schemas."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example(ABC):
    source: str
    """`file:line`, for messages."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """All the text in it, for a tokenizer to learn from and for a digest of the content."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text(Example):
    text: str

    def texts(self) -> Iterator[str]:
        yield self.text


@dataclasses.dataclass(frozen=True, slots=True)
class Completion(Example):
    """A text in two parts, of which the second is learned; no chat template is between them."""

    prompt: str
    completion: str

    def texts(self) -> Iterator[str]:
        yield self.prompt
        yield self.completion


@dataclasses.dataclass(frozen=True, slots=True)
class Chat(Example):
    messages: Messages
    tools: Tools | None = None

    def texts(self) -> Iterator[str]:
        yield from _said(self.messages)
        yield from _listed(self.tools)


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled(Example):
    text: str
    label: str

    def texts(self) -> Iterator[str]:
        yield self.text
        yield self.label


@dataclasses.dataclass(frozen=True, slots=True)
class Preference(Example):
    """Two ways to go on after `prompt`, the first of which is preferred."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: Tools | None = None

    def texts(self) -> Iterator[str]:
        for messages in (self.prompt, self.chosen, self.rejected):
            yield from _said(messages)
        yield from _listed(self.tools)


@dataclasses.dataclass(frozen=True, slots=True)
class Judged(Example):
    """A way to go on after `prompt`, and whether somebody found it good."""

    prompt: Messages
    completion: Messages
    good: bool
    tools: Tools | None = None

    def texts(self) -> Iterator[str]:
        yield from _said(self.prompt)
        yield from _said(self.completion)
        yield from _listed(self.tools)


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped(Example):
    """Stands for what a dataset leaves out, so that it is counted; no objective ever sees one."""

    reason: str
    """By which it is counted."""
    bad: bool = False
    """Whether it was to be a row, and `on_bad_row` decides; else it never was one."""

    def texts(self) -> Iterator[str]:
        yield from ()


SHAPES: Mapping[str, type[Example]] = {
    shape.__name__: shape for shape in (Text, Completion, Chat, Labelled, Preference, Judged)
}


@spec
class AbstractRows(DatasetSpec):
    """What every dataset can be told."""

    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens in a row."""
    packing: bool = True
    """Several documents in a row, each seeing only itself; else one document a row."""
    on_long: OnLong = "auto"
    """What becomes of an example of more than `max_length` tokens: split, truncate, drop, error; `auto` splits texts
    and truncates the rest."""
    on_bad_row: OnBadRow = "error"
    """A row that cannot be used ends the command (error), or is left out and counted (skip)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The largest share of rows that `on_bad_row=skip` leaves out; more ends the command all the same."""
    streaming: bool = False
    """Read, tokenise and pack while training instead of before it, for what does not fit on the disk of the cache."""
    stream_shards: Annotated[int, Field(ge=1)] = 64
    """Of a stream: into how many sequences it is dealt, whatever the number of ranks; each is read by one rank where
    there are no more ranks than that. Fewer where there are less than 64 documents for each."""
    stream_buffer: Annotated[int, Field(ge=1)] = 256
    """Of a stream: documents of a shard that are shuffled among each other and packed together; 1 keeps the order of
    the files."""


def _said(messages: Messages) -> Iterator[str]:
    for message in messages:
        if message.get("content"):
            yield message["content"]
        if message.get("tool_calls"):
            yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _listed(tools: Tools | None) -> Iterator[str]:
    if tools:
        yield json.dumps(tools, ensure_ascii=False)
