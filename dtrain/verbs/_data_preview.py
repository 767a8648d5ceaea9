"""Rows on the screen or in a file: which tokens are trained, which are context, and where documents begin."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

from dtrain.verbs._data_pieces import Piece, visible

if TYPE_CHECKING:
    from dtrain.data.rows import Row
    from dtrain.data.store import AbstractStore

_TRAINED, _FAINT, _BOLD, _PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_MARKS = (("[[", "]]"), ("{{{", "}}}"), ("⟦", "⟧"), ("<<<[", "]>>>"))


class Shown(NamedTuple):
    """A row and what it says."""

    title: str
    row: Row
    documents: list[list[Piece]]
    padding: str
    """What is put behind its tokens."""


def title(i: int, store: AbstractStore, part: str, row: Row) -> str:
    use = "train on" if part == "train" else "evaluate on"
    return f"row {i} of {len(store):,} to {use}{_source(i, store)}: {_size(row)}"


def sample_title(i: int, row: Row) -> str:
    """Of a stream, whose rows have no number but their place in the training."""
    return f"sample {i} of the stream to train on: {_size(row)}"


def _size(row: Row) -> str:
    num, trained, documents = len(row.tokens), row.num_targets, len(row.lengths)
    return (f"{num:,} tokens ({trained:,} trained, {num - trained:,} context) in {documents:,} "
            f"document{'s' if documents > 1 else ''}")  # fmt: skip


def _source(i: int, store: AbstractStore) -> str:
    """Of a mixture, from which a row is."""
    if len(store.sources) == 1:
        return ""
    ends = list(accumulate(map(len, store.sources.values())))
    return f", from {list(store.sources)[bisect(ends, i)]}"


def border(k: int, document: Sequence[Piece], of: int) -> str:
    num = sum(len(piece.ids) for piece in document)
    trained = sum(len(piece.ids) for piece in document if piece.trained)
    return f"document {k} of {of}: {num:,} tokens, {trained:,} trained"


def lines(rows: Sequence[Shown], *, color: bool, ids: bool) -> Iterator[str]:
    """The legend, and the rows. Without colour, marks are put around what is trained."""
    marks = (_TRAINED, _PLAIN) if color else _marks(rows)
    if ids:
        yield "legend: place in the row, id, T where it is trained, text"
    else:
        yield f"legend: {marks[0]}trained{marks[1]} context" + (f" {_FAINT}padding{_PLAIN}" if color else "")
    for shown in rows:
        yield ""
        yield f"{_BOLD}{shown.title}{_PLAIN}" if color else shown.title
        for k, document in enumerate(shown.documents, 1):
            line = f"--- {border(k, document, len(shown.documents))} ---"
            yield f"{_FAINT}{line}{_PLAIN}" if color else line
            yield from _listed(document, color=color) if ids else _text(document, marks, color=color)
        line = f"--- padding: {shown.padding} ---"
        yield f"{_FAINT}{line}{_PLAIN}" if color else line


def _marks(rows: Sequence[Shown]) -> tuple[str, str]:
    """The first that the rows do not have in their own text; the last where they have all."""
    text = "\n".join(piece.text for shown in rows for document in shown.documents for piece in document)
    return next((pair for pair in _MARKS if not any(mark in text for mark in pair)), _MARKS[-1])


def _text(document: Sequence[Piece], marks: tuple[str, str], *, color: bool) -> Iterator[str]:
    parts = []
    for trained, run in groupby(document, key=lambda piece: piece.trained):
        text = visible("".join(piece.text for piece in run))
        if not trained:
            parts.append(text)
        elif color:  # a line at a time, as pagers want it; the sign shows that the line's end is trained as well
            ends = text.split("\n")
            parts.append("⏎\x1b[0m\n".join(f"{_TRAINED}{line}" for line in ends) + _PLAIN)
        else:
            parts.append(f"{marks[0]}{text}{marks[1]}")
    yield from "".join(parts).split("\n")


def _listed(document: Sequence[Piece], *, color: bool) -> Iterator[str]:
    for piece in document:
        for k, token in enumerate(piece.ids):
            # repr, so that spaces and ends of lines are seen.
            text = repr(visible(piece.text)) if k == len(piece.ids) - 1 else "..."
            line = f"{piece.at + k:>7} {token:>7} {'T' if piece.trained else ' '}  {text}"
            yield f"{_TRAINED}{line}{_PLAIN}" if color and piece.trained else line
