"""Documents into rows: best fit, longest first, or what sums best; the same for the same lengths."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_SHARES = 33
_GOOD = 0.99
"""Of the fewest rows that may be possible: below it another way is tried."""
_SUMMED_LENGTH = 8192
"""Rows up to which it is: sums of many long documents would take minutes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """Which documents each row holds: `documents[starts[i] : starts[i + 1]]` for row i."""

    documents: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Ints]:
        for i in range(len(self)):
            yield self.documents[self.starts[i] : self.starts[i + 1]]


def one_each(num_documents: int) -> Packing:
    """A row for each document."""
    return Packing(np.arange(num_documents), np.arange(num_documents + 1))


def in_order(lengths: Ints, max_length: int) -> Packing:
    """Fill rows of up to `max_length` tokens with documents as they come. No length may be over `max_length`."""
    starts, room = [], 0
    for i, length in enumerate(lengths.tolist()):
        if length > room:
            starts.append(i)
            room = max_length
        room -= length
    return Packing(np.arange(len(lengths)), np.array([*starts, len(lengths)], np.int64))


def pack(lengths: Ints, max_length: int) -> Packing:
    """Fill rows of up to `max_length` tokens: each document, longest first, goes where it leaves the least room. Where
    that leaves much, as with documents of a third of a row, each row is filled by itself as well as it can be.

    No length may be 0 or over `max_length`. Rows come in the order of their first document.
    """
    if len(lengths) == 0:
        return one_each(0)
    assert lengths.min() > 0, "an empty document"
    assert lengths.max() <= max_length, (int(lengths.max()), max_length)
    row_of, num_rows = _best_fit(lengths, max_length)
    if max_length <= _SUMMED_LENGTH and fewest_rows(lengths, max_length) < _GOOD * num_rows:
        row_of, num_rows = min((row_of, num_rows), _best_sums(lengths, max_length), key=lambda way: way[1])
    return _by_first_document(row_of, num_rows)


def fewest_rows(lengths: NDArray[np.signedinteger[Any]], max_length: int) -> int:
    """A number of rows below which nothing can pack these documents. No length may be 0 or over `max_length`.

    The larger of two bounds. Martello and Toth's L2 (1990), for each length k up to half a row: documents longer than
    `max_length - k` share with none that is k or longer, and those over half a row share with none of each other; the
    rest of k or more fill what these leave, then rows of their own. Fekete and Schepers' (2001), for each k: of
    documents longer than a (k + 1)th of a row no more than k share one.
    """
    num = np.bincount(lengths, minlength=max_length + 1).astype(np.int64)
    return max(_l2(num, max_length), *(_by_shares(num, max_length, k) for k in range(1, _SHARES)))


def _l2(num: Ints, max_length: int) -> int:
    """`num` [max_length + 1]: of documents, by length."""
    num_from = np.cumsum(num[::-1])[::-1]
    sum_from = np.cumsum((num * np.arange(len(num)))[::-1])[::-1]
    half = max_length // 2
    ks = np.arange(1, half + 1)
    alone, over_half = num_from[max_length - ks + 1], num_from[half + 1]
    left = (over_half - alone) * max_length - (sum_from[half + 1] - sum_from[max_length - ks + 1])
    rest = sum_from[ks] - sum_from[half + 1]
    more = np.maximum(0, -(-(rest - left) // max_length))
    return int(max(over_half, -(-sum_from[0] // max_length), (over_half + more).max(initial=0)))


def _by_shares(num: Ints, max_length: int, k: int) -> int:
    """A document counts as many kths of a row as it is longer than (k + 1)ths, and as it is where it is so many."""
    above, rest = np.divmod(np.arange(max_length + 1) * (k + 1), max_length)
    # In units of a kth of a (k + 1)th, to stay with whole numbers.
    total = int((num * np.where(rest == 0, above * k, above * (k + 1))).sum())
    return -(-total // (k * (k + 1)))


def _best_fit(lengths: Ints, max_length: int) -> tuple[Ints, int]:
    """The row of each document, and the number of rows.

    Documents of one length are placed together, and rows with the same room are filled together: the work grows with
    the number of different lengths, not of documents. The outcome is that of placing one document at a time, as a row
    that was the best fit and still has room for the next document of this length is again the best fit.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_with: dict[int, deque[Ints]] = {}
    rooms = 0  # bit r is set where there is a row with room for r tokens
    num_rows = 0
    by_length = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[by_length])) + 1
    for documents in np.split(by_length, edges):
        length = int(lengths[documents[0]])
        while len(documents):
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            each = room // length
            needed = -(-len(documents) // each)
            if fitting:
                rows = rows_with[room].popleft()
                if len(rows) > needed:
                    rows_with[room].appendleft(rows[needed:])
                    rows = rows[:needed]
                if not rows_with[room]:
                    rooms ^= 1 << room
            else:
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            now, documents = documents[: len(rows) * each], documents[len(rows) * each :]
            row_of[now] = np.repeat(rows, each)[: len(now)]
            in_last = len(now) - (len(rows) - 1) * each
            for part, left in ((rows[:-1], room - each * length), (rows[-1:], room - in_last * length)):
                if left and len(part):
                    rows_with.setdefault(left, deque()).append(part)
                    rooms |= 1 << left
    return row_of, num_rows


def _best_sums(lengths: Ints, max_length: int) -> tuple[Ints, int]:
    """As `_best_fit`, another way: the longest document that is left, and those whose lengths sum to what comes nearest
    to the rest of its row (Gupta and Ho's minimum bin slack, 1999).

    A row is made again as often as there are documents of its lengths, so that the work grows with the number of
    different lengths.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[by_length])) + 1
    left = {int(lengths[documents[0]]): documents for documents in np.split(by_length, edges)}
    num_rows = 0
    while left:
        longest = next(iter(left))
        num_of = {length: len(documents) for length, documents in left.items()}
        num_of[longest] -= 1
        row = _nearest_sum(num_of, max_length - longest)
        row[longest] = row.get(longest, 0) + 1
        times = min(len(left[length]) // num for length, num in row.items())
        for length, num in row.items():
            row_of[left[length][: num * times]] = np.repeat(np.arange(num_rows, num_rows + times), num)
            left[length] = left[length][num * times :]
            if not len(left[length]):
                del left[length]
        num_rows += times
    return row_of, num_rows


def _nearest_sum(num_of: Mapping[int, int], room: int) -> dict[int, int]:
    """How many of each length sum to the most that is not over `room`; as few different ones as come first."""
    sums, within = 1, (1 << (room + 1)) - 1  # bit n is set where some documents sum to n
    before: list[tuple[int, int]] = []
    for length, num in num_of.items():
        usable, each = min(num, room // length), 1
        if not usable:
            continue
        before.append((length, sums))
        while usable:
            each = min(each, usable)
            sums |= (sums << (each * length)) & within
            usable, each = usable - each, 2 * each
        if sums >> room:
            break
    found: dict[int, int] = {}
    total = sums.bit_length() - 1
    for length, reached in reversed(before):
        while not reached >> total & 1:
            found[length] = found.get(length, 0) + 1
            total -= length
    return found


def _by_first_document(row_of: Ints, num_rows: int) -> Packing:
    documents = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    order = np.argsort(documents[starts[:-1]])
    rank = np.empty(num_rows, np.int64)
    rank[order] = np.arange(num_rows)
    row_of = rank[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Packing(np.argsort(row_of, kind="stable"), starts)
