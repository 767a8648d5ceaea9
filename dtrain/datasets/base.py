"""The shapes that a dataset yields. Few, typed, and each knows where it came from."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    source: str
    """`file:line`, for messages."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text(Example):
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chat(Example):
    messages: list[dict[str, Any]]
    """`{"role": ..., "content": ...}` in order; roles as the chat template knows them."""
