"""Tokens as text that can be read and put together again: what each adds to the text before it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer

_UNKNOWN = "\ufffd"
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""These change the direction of what is shown after them."""


class Piece(NamedTuple):
    text: str
    at: int
    """The place of its first token in the row."""
    ids: list[int]
    """Several where only together they are characters."""
    trained: bool


def documents(row: Row, tokenizer: TextTokenizer) -> Iterator[list[Piece]]:
    """Each document of a row, in order."""
    ids, targets, start = row.tokens.tolist(), row.targets.tolist(), 0
    for length in row.lengths.tolist():
        yield _pieces(ids[start : start + length], targets[start : start + length], start, tokenizer)
        start += length


def _pieces(ids: list[int], targets: list[bool], start: int, tokenizer: TextTokenizer) -> list[Piece]:
    """What a token is as text may depend on the one before: a decoder strips the first space, a character may be of
    several tokens. So each is decoded after the piece before it. No piece is of trained and other tokens.
    """
    found = []
    before = told = 0
    for end in range(1, len(ids) + 1):
        old, text = tokenizer.decode(ids[before:told]), tokenizer.decode(ids[before:end])
        if not text.startswith(old):
            old, text = "", tokenizer.decode(ids[told:end])
        whole = len(text) > len(old) and not text.endswith(_UNKNOWN)
        if whole or end == len(ids) or targets[end] != targets[told]:
            found.append(Piece(text[len(old) :], start + told, ids[told:end], targets[told]))
            before, told = told, end
    return found


def visible(text: str) -> str:
    """Without characters that steer a terminal or turn the text around: those are written as escapes."""
    return "".join(char.encode("unicode_escape").decode() if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    return char in _TURNS or (unicodedata.category(char) == "Cc" and char not in "\n\t")
