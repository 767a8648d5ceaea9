import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.pack import _best_sums, _nearest_sum, fewest_rows, one_each, pack


def rows(lengths, max_length):
    return [each.tolist() for each in pack(np.array(lengths, np.int64), max_length)]


def test_the_best_fit_by_hand():
    # Longest first: 7 | 6 | 4 goes with 6 (room 4, not 3... row 7 has room 3) | 3 goes with 7 | 2 opens a row.
    assert rows([2, 3, 4, 6, 7], 10) == [[0], [1, 4], [2, 3]]


def test_several_of_one_length_in_a_row():
    assert rows([3, 3, 3, 3], 10) == [[0, 1, 2], [3]]


def test_nothing():
    assert rows([], 10) == []


def place_one_by_one(lengths, max_length):
    """Best fit decreasing as one would write it down: the number of rows that it takes."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max_length) - length)
    return len(rooms)


@given(st.lists(st.integers(1, 40), max_size=80))
def test_no_document_is_lost_or_doubled_and_no_row_is_too_long(lengths):
    packed = rows(lengths, 40)
    assert sorted(i for each in packed for i in each) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in each) <= 40 for each in packed)
    assert [each[0] for each in packed] == sorted(each[0] for each in packed)
    assert packed == rows(lengths, 40)
    assert len(packed) <= place_one_by_one(lengths, 40)


def test_where_the_best_fit_leaves_much_rows_are_summed():
    # Longest first: 8 and 8, then three 6s a row, leave 4 and 2 of 20; the best is two of 6 with an 8.
    lengths = [8, 8, 8, 8, 6, 6, 6, 6, 6, 6, 6, 6]
    assert place_one_by_one(lengths, 20) == 5
    assert len(rows(lengths, 20)) == 4
    third = np.random.default_rng(0).normal(640, 110, 7_000).clip(170, 2048).astype(np.int64)
    assert third.sum() / (place_one_by_one(third.tolist(), 2048) * 2048) < 0.96
    assert third.sum() / (len(pack(third, 2048)) * 2048) > 0.98


@given(st.lists(st.integers(1, 12), max_size=7), st.integers(12, 15))
def test_sums_lose_and_double_nothing(lengths, max_length):
    row_of, num_rows = _best_sums(np.array(lengths, np.int64), max_length) if lengths else (np.empty(0), 0)
    held = [sum(length for length, row in zip(lengths, row_of, strict=True) if row == k) for k in range(num_rows)]
    assert all(0 < total <= max_length for total in held)
    assert sum(held) == sum(lengths)


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(1, 60))
def test_the_nearest_sum(lengths, room):
    counts = {length: lengths.count(length) for length in lengths}
    found = _nearest_sum(counts, room)
    assert all(num <= counts[length] for length, num in found.items())
    sums = {sum(some) for num in range(len(lengths) + 1) for some in itertools.combinations(lengths, num)}
    assert sum(length * num for length, num in found.items()) == max(one for one in sums if one <= room)


def fewest_by_trial(lengths, max_length):
    """The fewest rows that hold these documents, by trying every way."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for k in range(len(rooms)):
            if rooms[k] >= lengths[i]:
                place(i + 1, [*rooms[:k], rooms[k] - lengths[i], *rooms[k + 1 :]])
        place(i + 1, [*rooms, max_length - lengths[i]])

    place(0, [])
    return best


@given(st.lists(st.integers(1, 12), max_size=7), st.integers(12, 15))
def test_no_packing_takes_fewer_rows_than_the_bound(lengths, max_length):
    bound = fewest_rows(np.array(lengths, np.int64), max_length)
    assert -(-sum(lengths) // max_length) <= bound <= fewest_by_trial(lengths, max_length)


def test_the_bound_where_long_documents_share_no_row():
    assert fewest_rows(np.array([6, 6, 6, 6]), 10) == 4
    # 3s go beside 6s, one each; the fifth and sixth need a row of their own.
    assert fewest_rows(np.array([6, 6, 6, 6, 3, 3, 3, 3, 3, 3]), 10) == 5
    # 9s leave no room for a 2, so that the 2s need rows beside the 6.
    assert fewest_rows(np.array([9, 9, 9, 6, 2, 2, 2]), 10) == 5
    # Of those over a third of a row no more than two share one.
    assert fewest_rows(np.array([4, 4, 4, 4, 4, 4]), 10) == 3


def test_a_real_mix_is_packed_tightly():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000), 1, 2048).astype(np.int64)
    assert lengths.sum() / (len(pack(lengths, 2048)) * 2048) > 0.98


def test_a_million_documents_take_seconds():
    import time

    lengths = np.random.default_rng(0).integers(1, 4097, 1_000_000)
    start = time.process_time()
    pack(lengths, 4096)
    assert time.process_time() - start < 10


def test_too_long_is_our_mistake():
    with pytest.raises(AssertionError):
        pack(np.array([11]), 10)


def test_without_packing():
    assert [each.tolist() for each in one_each(3)] == [[0], [1], [2]]
