from itertools import pairwise

import numpy as np
import pytest

from dtrain.data.loader import Loader, eval_windows
from dtrain.data.order import global_batch_ids
from dtrain.data.places import consumed, padding
from dtrain.data.rows import Row
from dtrain.data.store import MixedStore, RowStore, write_rows
from dtrain.plan.batch import BatchPlan

NUM_ROWS = 23


def make(path, lengths, *, packed=True):
    made = []
    for i, length in enumerate(lengths):
        made.append(Row(np.full(length, i, np.int32), np.arange(length) > 0, np.array([length], np.int32)))
    write_rows(path, made, packed=packed)
    return RowStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("store") / "rows.arrow", [2 + i % 5 for i in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    lengths = np.random.default_rng(0).integers(2, 200, 150)
    return make(tmp_path_factory.mktemp("store") / "rows.arrow", lengths.tolist(), packed=False)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, store, unpacked):
    return MixedStore({"a": store, "b": unpacked}, {"a": 1.0, "b": 2.5}, "repeat")


def ids_of(batches):
    return [i for batch in batches for i in batch.sample_ids]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
@pytest.mark.parametrize("global_batch", [1, 10, 16])
def test_the_samples_of_a_step_do_not_depend_on_the_ranks(store, size, micro_batch, global_batch):
    plan = BatchPlan(global_batch, micro_batch, size)
    loaders = [Loader(store, plan, rank=rank, seed=5, pad_id=0) for rank in range(size)]
    for step in (0, 1, 4):
        windows = [loader.window(step * global_batch) for loader in loaders]
        together = [i for window in windows for i in ids_of(window)]
        assert together == global_batch_ids(5, step, global_batch, NUM_ROWS).tolist()
        assert {len(window) for window in windows} == {plan.accumulate}
        assert all(len(batch.sample_ids) <= micro_batch for window in windows for batch in window)
        total = sum(batch.num_targets for window in windows for batch in window)
        assert total == sum(1 + i % 5 for i in together)  # row i has 2 + i % 5 tokens, all but one targets


def test_a_window_can_be_asked_for_again(store):
    loader = Loader(store, BatchPlan(4, 2, 1), rank=0, seed=0, pad_id=0)
    first = loader.window(3)
    loader.window(50)
    assert ids_of(loader.window(3)) == ids_of(first)


def test_rows_are_padded_to_the_longest_present(store):
    loader = Loader(store, BatchPlan(4, 4, 1), rank=0, seed=0, pad_id=0)
    (batch,) = loader.window(0)
    assert batch.inputs["tokens"].shape == (4, max(2 + i % 5 for i in batch.sample_ids))


def test_epochs_are_counted(store):
    loader = Loader(store, BatchPlan(NUM_ROWS, 4, 1), rank=0, seed=0, pad_id=0)
    assert [loader.epoch(samples) for samples in (0, NUM_ROWS, 2 * NUM_ROWS)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("max_rows", [None, 1, 7, 100])
def test_eval_covers_every_row_once(store, size, max_rows):
    windows = [
        list(eval_windows(store, BatchPlan(10, 2, size), rank=rank, pad_id=0, max_rows=max_rows))
        for rank in range(size)
    ]
    seen = sorted(i for rank in windows for window in rank for i in ids_of(window))
    assert seen == list(range(min(max_rows or NUM_ROWS, NUM_ROWS)))
    assert len({tuple(map(len, rank)) for rank in windows}) == 1  # every rank makes the same calls


@pytest.mark.parametrize("kind", ["store", "unpacked", "mixed"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_every_kind_of_order_gives_all_ranks_together_the_same_samples(request, kind, size, micro_batch):
    rows = request.getfixturevalue(kind)
    plan = BatchPlan(10, micro_batch, size)
    loaders = [Loader(rows, plan, rank=rank, seed=5, pad_id=0) for rank in range(size)]
    order = rows.order(5)
    for step in (0, 2, 3, 40):  # in no order, so that some are made ahead and some are not
        windows = [loader.window(step * 10) for loader in loaders]
        assert sorted(i for window in windows for i in ids_of(window)) == sorted(order.ids(step * 10, 10).tolist())
        assert {len(window) for window in windows} == {plan.accumulate}


def test_rows_are_dealt_out_by_length(unpacked):
    plan = BatchPlan(24, 3, 2)
    windows = [Loader(unpacked, plan, rank=rank, seed=0, pad_id=0).window(0) for rank in range(2)]
    lengths = unpacked.lengths
    layers = [[lengths[i] for window in windows for i in window[m].sample_ids] for m in range(plan.accumulate)]
    assert [len(layer) for layer in layers] == [6, 6, 6, 6]
    assert all(min(before) >= max(after) for before, after in pairwise(layers))
    widths = [batch.inputs["tokens"].shape[1] for window in windows for batch in window]
    assert widths == [max(lengths[i] for i in batch.sample_ids) for window in windows for batch in window]


def test_the_share_of_padding_is_that_of_the_batches(unpacked, store):
    for rows in (unpacked, store):
        plan = BatchPlan(12, 4, 2)
        batches = [batch for rank in range(2) for loader in [Loader(rows, plan, rank=rank, seed=3, pad_id=0)]
                   for step in range(5) for batch in loader.window(12 * step)]  # fmt: skip
        computed = sum(batch.inputs["tokens"].numel() for batch in batches)
        expected = 1 - sum(batch.num_tokens for batch in batches) / computed
        assert padding(rows, rows.order(3), plan, steps=5) == pytest.approx(expected)


def test_what_has_been_consumed_is_counted_to_the_token(mixed, store, unpacked):
    for rows in (store, unpacked, mixed):
        order = rows.order(1)
        ids = order.ids(0, 700)
        starts = dict(zip(rows.sources, np.cumsum([0, *map(len, rows.sources.values())]), strict=False))
        for samples in (0, 1, 23, 99, 150, 172, 500, 700):
            expected = {}
            for name, source in rows.sources.items():
                mine = [i - starts[name] for i in ids[:samples] if 0 <= i - starts[name] < len(source)]
                expected[name] = {"samples": len(mine), "tokens": sum(int(source.lengths[i]) for i in mine)}
            assert consumed(rows, order, samples) == expected
            loader = Loader(rows, BatchPlan(4, 2, 1), rank=0, seed=1, pad_id=0)
            assert loader.consumed(samples) == expected


def test_eval_of_a_mixture_looks_at_all_sources(mixed):
    (window,) = eval_windows(mixed, BatchPlan(14, 14, 1), rank=0, pad_id=0, max_rows=14)
    # By rate 1 : 2.5, so 4 of the first source and 10 of the second.
    assert sum(i < NUM_ROWS for i in ids_of(window)) == 4
    every = [i for window in eval_windows(mixed, BatchPlan(14, 14, 1), rank=0, pad_id=0) for i in ids_of(window)]
    assert sorted(every) == list(range(NUM_ROWS + 150))
    assert mixed.row(NUM_ROWS).tokens.tolist() == [0] * mixed.lengths[NUM_ROWS]
