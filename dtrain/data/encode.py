"""Examples to documents: token ids and targets, none longer than a row, and a count of all that was left out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.config.spec import ObjectiveSpec, OnLong
from dtrain.data.rows import Row
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRowError, BadRows, LeftOutError
from dtrain.datasets.base import Example, Skipped
from dtrain.errors import DataError

_CHUNK = 256
_SAY_EVERY_S = 10.0
_SKIPPED, _LEFT_OUT = "skipped: {}", "bad, left out: {}"


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
    rows: list[Row]
    """Each one document, or a piece of one, of at most `max_length` tokens and with at least one target."""
    shares: NDArray[np.float64]
    """For each, a number in [0, 1) that only its document's text and the seed decide; the same for all pieces."""
    counts: Counter[str]
    """What became of the examples, by reason, in the words that a user reads."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    max_length: int
    on_long: OnLong
    """Never `auto`."""


def encode_all(
    examples: Iterable[Example],
    objective: ObjectiveSpec,
    tokenizer: TextTokenizer,
    limit: Limit,
    *,
    bad: BadRows,
    seed: int,
    say: Callable[[str], None],
) -> Documents:
    """Encode in parallel; the outcome is in the order of `examples`. `bad` says what becomes of a row that cannot be
    used. Raises DataError with all that is wrong.
    """
    rows: list[Row] = []
    shares: list[float] = []
    counts: Counter[str] = Counter()
    told = time.monotonic()
    for example, row in _encoded(_counted(examples, counts, bad), objective, tokenizer):
        try:
            pieces = _fit(_found(row), limit, counts)
        except BadRowError as error:
            counts[_LEFT_OUT.format(bad.add(example.source, error).reason)] += 1
            continue
        except LeftOutError as error:
            counts[f"left out: {error}"] += 1
            bad.num_good += 1
            continue
        bad.num_good += 1
        share = _share(example, seed)
        for piece in pieces:
            if piece.targets.any():
                rows.append(piece)
                shares.append(share)
            else:
                counts["left out: no token to learn"] += 1
        if time.monotonic() - told > _SAY_EVERY_S:
            told = time.monotonic()
            say(f"data: {counts['read']:,} documents so far")
    bad.check()
    return Documents(rows, np.array(shares, np.float64), counts)


def _encoded(
    examples: Iterator[Example], objective: ObjectiveSpec, tokenizer: TextTokenizer
) -> Iterator[tuple[Example, Row | BadRowError | LeftOutError]]:
    def encode(example: Example) -> Row | BadRowError | LeftOutError:
        try:
            return objective.encode(example, tokenizer)
        except (BadRowError, LeftOutError) as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(examples, _CHUNK)):
            yield from zip(chunk, pool.map(encode, chunk), strict=True)


def _counted(examples: Iterable[Example], counts: Counter[str], bad: BadRows) -> Iterator[Example]:
    """Only what can be encoded, all of one shape. Raises DataError."""
    shape: type[Example] | None = None
    for example in examples:
        if isinstance(example, Skipped):
            if example.bad:
                bad.count(example)
            counts[(_LEFT_OUT if example.bad else _SKIPPED).format(example.reason)] += 1
            continue
        shape = shape or type(example)
        if type(example) is not shape:
            raise DataError(f"{example.source}: {type(example).__name__.lower()} among rows of "
                            f"{shape.__name__.lower()}; make all rows of one kind")  # fmt: skip
        counts["read"] += 1
        yield example


def _found(row: Row | BadRowError | LeftOutError) -> Row:
    if isinstance(row, Row):
        return row
    raise row


def _fit(row: Row, limit: Limit, counts: Counter[str]) -> list[Row]:
    """The pieces of a document that fit into a row. Raises BadRowError where that is what to do with a long one."""
    assert len(row.lengths) == 1, "an objective encodes one document at a time"
    assert not row.targets[:1].any(), "the first token is never a target: nothing comes before it"
    num, most = len(row.tokens), limit.max_length
    if num <= most:
        return [row]
    if limit.on_long == "error":
        raise BadRowError(f"{num} tokens, over dataset.max_length={most}; raise it, or set dataset.on_long to split, "
                          f"truncate or drop")  # fmt: skip
    if limit.on_long == "drop":
        counts[f"left out: over {most} tokens"] += 1
        return []
    if limit.on_long == "truncate":
        counts[f"truncated to {most} tokens"] += 1
        counts["tokens cut off"] += num - most
        if row.targets[most:].any():
            counts["of these to be learned"] += int(row.targets[most:].sum())
        if row.targets[most - 1 : most + 1].all():
            counts["cut within what is learned"] += 1
        return [_piece(row, 0, most)]
    assert limit.on_long == "split", limit.on_long
    counts[f"split at {most} tokens"] += 1
    return [_piece(row, start, min(start + most, num)) for start in range(0, num, most)]


def _piece(row: Row, start: int, end: int) -> Row:
    targets = row.targets[start:end].copy()
    targets[0] = False
    return Row(row.tokens[start:end], targets, np.array([end - start], np.int32))


def _share(example: Example, seed: int) -> float:
    state = xxhash.xxh3_64(seed=seed % 2**64)
    for text in example.texts():
        state.update(text.encode())
        state.update(b"\0")
    return state.intdigest() / 2**64
