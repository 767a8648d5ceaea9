import numpy as np
import pytest

from dtrain.data.loader import Loader, eval_windows
from dtrain.data.order import global_batch_ids
from dtrain.data.rows import Row
from dtrain.data.store import RowStore, write_rows
from dtrain.plan.batch import BatchPlan

NUM_ROWS = 23


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "rows.arrow"
    made = []
    for i in range(NUM_ROWS):
        targets = np.arange(2 + i % 5) > 0
        made.append(Row(np.full(len(targets), i, np.int32), targets, np.array([len(targets)], np.int32)))
    write_rows(path, made, NUM_ROWS)
    return RowStore(path)


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
