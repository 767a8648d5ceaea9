"""What is in the prepared rows, counted from the rows themselves."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dtrain.errors import UserError
from dtrain.verbs._table import lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dtrain.data.store import AbstractStore
    from dtrain.verbs._data_rows import Opened

_READ, _TRUNCATED, _SPLIT, _EMPTY = "read", "truncated", "split", "left out: no token to learn"
_LOST = ("bad, left out", "left out: over", _EMPTY)
"""How those reasons begin by which rows are lost; further ones are rules that a dataset or an objective has."""
_BINS = 12
_BAR = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Of those to train on, or those held out."""

    num: int
    num_tokens: int
    num_targets: int
    lengths: NDArray[np.int32]
    """Tokens of each document, or piece of a long one."""
    content: NDArray[np.uint64]
    """A digest of the tokens of each."""

    @property
    def num_duplicates(self) -> int:
        """Documents whose tokens are those of one before."""
        import numpy as np

        return len(self.content) - len(np.unique(self.content))


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    train: Rows
    held_out: Rows
    max_length: int
    reasons: Mapping[str, int]
    """What became of the examples."""
    by_source: Mapping[str, Mapping[str, int]]
    """The same of each file, or whatever else they come from."""
    first: Mapping[str, list[str]]
    """Where the first of each reason are."""
    num_overlap: int
    """Documents held out that are among those trained on."""

    @property
    def fill(self) -> float:
        """Share of the tokens of full-length rows that is not padding."""
        return self.train.num_tokens / (self.train.num * self.max_length)

    @property
    def num_examples(self) -> int:
        """Those that were read."""
        return self.reasons.get(_READ, 0)

    @property
    def truncated(self) -> dict[str, int]:
        return {reason: num for reason, num in self.reasons.items() if reason.startswith(_TRUNCATED)}

    @property
    def lost(self) -> dict[str, int]:
        # Where long ones are split, those without a token to learn are pieces, such as a last token by itself.
        pieces = any(reason.startswith(_SPLIT) for reason in self.reasons)
        return {reason: num for reason, num in self.reasons.items()
                if reason.startswith(_LOST) and not (pieces and reason == _EMPTY)}  # fmt: skip


def measure(opened: Opened) -> Stats:
    """Raises UserError where the rows are not on disk."""
    import numpy as np

    if opened.prepared.streams:
        raise UserError("dataset.streaming=true: stats and checks are counted from prepared rows, and a stream has "
                        "none; look at it by `dtrain data preview`, or set dataset.streaming=false for a part of the "
                        "data")  # fmt: skip
    train, held_out = _rows(opened.store("train")), _rows(opened.store("eval"))
    prepared = opened.prepared
    return Stats(train, held_out, prepared.max_length, prepared.counts, prepared.by_source, prepared.first,
                 int(np.isin(held_out.content, train.content).sum()))  # fmt: skip


def _rows(store: AbstractStore) -> Rows:
    import numpy as np
    import xxhash

    lengths, content = array("i"), array("Q")
    num_tokens = num_targets = 0
    for i in range(len(store)):
        row = store.row(i)
        num_tokens += len(row.tokens)
        num_targets += row.num_targets
        lengths.frombytes(row.lengths.tobytes())
        start = 0
        for length in row.lengths.tolist():
            content.append(xxhash.xxh3_64_intdigest(row.tokens[start : start + length].data))
            start += length
    return Rows(len(store), num_tokens, num_targets, np.frombuffer(lengths, np.int32),
                np.frombuffer(content, np.uint64))  # fmt: skip


def bins(rows: Rows) -> list[tuple[int, int, int]]:
    """Of the lengths of documents: from, to, and how many, in up to twelve steps of the same width."""
    import numpy as np

    if not len(rows.lengths):
        return []
    width = -(-int(rows.lengths.max()) // _BINS)
    counts = np.bincount((rows.lengths - 1) // width)
    return [(k * width + 1, (k + 1) * width, int(num)) for k, num in enumerate(counts)]


def as_dict(stats: Stats, notes: Iterable[str]) -> dict[str, Any]:
    return {
        "train": _fields(stats.train),
        "eval": _fields(stats.held_out),
        "fill": stats.fill,
        "max_length": stats.max_length,
        "examples": dict(stats.reasons),
        "examples_by_source": {source: dict(reasons) for source, reasons in stats.by_source.items()},
        "first": dict(stats.first),
        "overlap": stats.num_overlap,
        "notes": list(notes),
    }


def _fields(rows: Rows) -> dict[str, Any]:
    return {"rows": rows.num, "documents": len(rows.lengths), "tokens": rows.num_tokens, "targets": rows.num_targets,
            "duplicates": rows.num_duplicates, "lengths": _quantiles(rows),
            "histogram": [{"from": low, "to": high, "documents": num} for low, high, num in bins(rows)]}  # fmt: skip


def _quantiles(rows: Rows) -> dict[str, float]:
    import numpy as np

    if not len(rows.lengths):
        return {}
    points = np.quantile(rows.lengths, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf").tolist()
    return {**dict(zip(("least", "median", "p90", "p99", "most"), points, strict=True)),
            "mean": float(rows.lengths.mean())}  # fmt: skip


def text(stats: Stats) -> list[str]:
    """For the screen."""
    train, held_out = stats.train, stats.held_out
    middle = _quantiles(train)
    found = [
        ("rows", f"{train.num:,} to train on, {held_out.num:,} held out"),
        ("documents", f"{len(train.lengths):,} to train on, {len(held_out.lengths):,} held out (pieces of long ones "
                      f"count)"),
        ("tokens", f"{train.num_tokens:,} to train on, {held_out.num_tokens:,} held out"),
        ("trained", share(train.num_targets, train.num_tokens, "tokens")),
        ("fill", f"{stats.fill:.2%} of rows of {stats.max_length:,} tokens"),
        ("examples", ", ".join(f"{num:,} {reason}" for reason, num in stats.reasons.items())),
        ("duplicates", f"{share(train.num_duplicates, len(train.lengths), 'documents')} repeat one before"),
        ("overlap", f"{share(stats.num_overlap, len(held_out.lengths), 'documents held out')} are trained on too"),
        ("lengths", f"tokens of a document: {middle['least']:,} to {middle['most']:,}, mean {middle['mean']:,.0f}, "
                    f"median {middle['median']:,}, 90% up to {middle['p90']:,}, 99% up to {middle['p99']:,}"),
    ]  # fmt: skip
    return [*lines(found), *_bars(bins(train))]


def share(num: int, of: int, what: str) -> str:
    """`12 of 999 documents (1.20%)`."""
    return f"{num:,} of {of:,} {what}" + (f" ({num / of:.2%})" if of else "")


def _bars(found: list[tuple[int, int, int]]) -> list[str]:
    most = max(num for *_, num in found)
    width = len(f"{found[-1][1]:,}")
    return [f"  {low:>{width},} to {high:>{width},}  {'█' * -(-num * _BAR // most):<{_BAR}} {num:,}"
            for low, high, num in found]  # fmt: skip
