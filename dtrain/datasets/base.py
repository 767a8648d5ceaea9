"""The shapes that a dataset yields. Few, typed, and each knows where it came from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

OnLong = Literal["auto", "split", "truncate", "drop", "error"]
"""What becomes of an example of more than `max_length` tokens: cut into pieces, cut off at the end, left out, refused.
`auto` splits a text, so that all of it is learned, and truncates a conversation, whose pieces would lack their
beginning. Each case is counted and told."""


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
class Chat(Example):
    messages: list[dict[str, Any]]
    """`{"role": ..., "content": ...}` in order; roles as the chat template knows them."""

    def texts(self) -> Iterator[str]:
        for message in self.messages:
            yield message["content"]


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped(Example):
    """Stands for what a dataset leaves out, so that it is counted; no objective ever sees one."""

    reason: str

    def texts(self) -> Iterator[str]:
        yield from ()


SHAPES: dict[str, type[Example]] = {shape.__name__: shape for shape in (Text, Chat)}
