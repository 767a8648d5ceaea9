"""Any global batch on any number of ranks: worked out by hand, then for whatever hypothesis thinks of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.plan.batch import BatchPlan

SIZES = st.integers(1, 300)


def test_ten_on_four() -> None:
    plan = BatchPlan(global_batch=10, micro_batch=2, size=4)
    assert [plan.count(rank) for rank in range(4)] == [3, 3, 2, 2]
    assert [plan.start(rank) for rank in range(4)] == [0, 3, 6, 8]
    assert plan.accumulate == 2  # three samples, two at a time
    assert [list(plan.micros(rank)) for rank in range(4)] == [
        [range(0, 2), range(2, 3)], [range(3, 5), range(5, 6)], [range(6, 7), range(7, 8)], [range(8, 9), range(9, 10)],
    ]  # fmt: skip
    assert plan.busy == 10 / 12
    assert (
        plan.describe()
        == "global 10 = 3+3+2+2 over 4 ranks, 2 micro-batches of up to 2, 83% busy; 8 or 12 would be 100 %"
    )


def test_three_on_five() -> None:
    plan = BatchPlan(global_batch=3, micro_batch=4, size=5)
    assert [plan.count(rank) for rank in range(5)] == [1, 1, 1, 0, 0]
    assert [list(plan.micros(rank)) for rank in (0, 4)] == [[range(0, 1)], [range(3, 3)]]  # idle, and yet a forward
    assert plan.describe().endswith("60% busy; 5 would be 100 %")


@pytest.mark.parametrize(("numbers", "said"), [
    ((16, 16, 1), "global 16 = 16 on 1 rank, 1 micro-batch of up to 16"),
    ((16, 4, 2), "global 16 = 8 x 2 ranks, 2 micro-batches of up to 4"),
    ((1030, 8, 256), "global 1030 = 6 ranks x 5 + 250 ranks x 4, 1 micro-batch of up to 8, 80% busy; 1024 or 1280 would be 100 %"),
])  # fmt: skip
def test_in_words(numbers: tuple[int, int, int], said: str) -> None:
    assert BatchPlan(*numbers).describe() == said


@given(global_batch=st.integers(1, 2000), micro_batch=st.integers(1, 70), size=SIZES)
def test_every_sample_exactly_once(global_batch: int, micro_batch: int, size: int) -> None:
    plan = BatchPlan(global_batch, micro_batch, size)
    taken = []
    for rank in range(size):
        micros = list(plan.micros(rank))
        assert len(micros) == plan.accumulate  # every rank makes the same number of calls
        assert all(len(one) <= micro_batch for one in micros)
        assert max(map(len, micros)) - min(map(len, micros)) <= 1
        assert sum(map(len, micros)) == plan.count(rank)
        taken += [place for one in micros for place in one]
    assert taken == list(range(global_batch))
    assert (plan.accumulate - 1) * micro_batch < plan.count(0)  # and none in vain
    assert 0 < plan.busy <= 1
    assert (plan.busy == 1) == (global_batch % size == 0)


@given(global_batch=st.integers(1, 2000), micro_batch=st.integers(1, 70), size=SIZES)
def test_it_can_be_said(global_batch: int, micro_batch: int, size: int) -> None:
    said = BatchPlan(global_batch, micro_batch, size).describe()
    assert said.startswith(f"global {global_batch} = ")
    assert len(said) < 160
