import numpy as np
import pytest

from dtrain.data.order import global_batch_ids, index_at, samples_at


def test_an_epoch_visits_every_sample_once():
    order = [index_at(7, 0, position, 50) for position in range(50)]
    assert sorted(order) == list(range(50))
    assert order != sorted(order)


def test_epochs_and_seeds_differ():
    orders = {tuple(samples_at(seed, epoch * 50, 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_batch_lies_across_epochs():
    # 5 rows, batches of 3: step 1 takes places 3, 4 of epoch 0 and place 0 of epoch 1.
    expected = [index_at(0, 0, 3, 5), index_at(0, 0, 4, 5), index_at(0, 1, 0, 5)]
    assert global_batch_ids(0, 1, 3, 5).tolist() == expected


def test_a_batch_larger_than_the_data():
    ids = global_batch_ids(0, 0, 7, 3)
    assert sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("global_batch", [1, 4, 7, 100])
def test_any_global_batch_walks_the_same_sequence(global_batch):
    walked = np.concatenate([global_batch_ids(3, step, global_batch, 11) for step in range(-(-60 // global_batch))])
    assert walked[:60].tolist() == samples_at(3, 0, 60, 11).tolist()


def test_the_order_never_changes():
    # Resuming with a later version must go on in the same order: these are part of the file format.
    assert samples_at(0, 0, 10, 10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
