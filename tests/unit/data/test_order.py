import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.order import Grouped, Mixed, Shuffled, by_rate, global_batch_ids


def test_an_epoch_visits_every_sample_once():
    order = Shuffled(7, 50).ids(0, 50).tolist()
    assert sorted(order) == list(range(50))
    assert order != sorted(order)


def test_epochs_and_seeds_differ():
    orders = {tuple(Shuffled(seed, 50).ids(epoch * 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_batch_lies_across_epochs():
    # 5 rows, batches of 3: step 1 takes places 3, 4 of epoch 0 and place 0 of epoch 1.
    both = Shuffled(0, 5).ids(0, 10)
    assert sorted(both[:5]) == sorted(both[5:]) == list(range(5))
    assert global_batch_ids(0, 1, 3, 5).tolist() == both[3:6].tolist()


def test_a_batch_larger_than_the_data():
    ids = global_batch_ids(0, 0, 7, 3)
    assert sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("global_batch", [1, 4, 7, 100])
def test_any_global_batch_walks_the_same_sequence(global_batch):
    walked = np.concatenate([global_batch_ids(3, step, global_batch, 11) for step in range(-(-60 // global_batch))])
    assert walked[:60].tolist() == Shuffled(3, 11).ids(0, 60).tolist()


def test_the_order_never_changes():
    # Resuming with a later version must go on in the same order: these are part of the file format.
    assert Shuffled(0, 10).ids(0, 10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    mixed = Mixed(0, [6, 3], [2.0, 1.0], "drop")
    assert mixed.ids(0, 9).tolist() == [3, 5, 6, 1, 4, 8, 7, 0, 2]
    assert Grouped(0, Shuffled(0, 99), np.arange(99)[::-1]).ids(0, 99)[::16].tolist() == [34, 18, 98, 82, 66, 50, 2]


SIZES, RATES = (500, 300, 7), (2.5, 1.0, 0.05)
OFFSETS = np.array([0, 500, 800])


def sources_of(ids):
    return np.searchsorted(OFFSETS, ids, "right") - 1


@pytest.mark.parametrize("on_dry", ["stop", "repeat", "drop"])
def test_a_mixture_keeps_every_sources_own_order_and_count(on_dry):
    order = Mixed(5, SIZES, RATES, on_dry)
    ids = order.ids(0, 3 * order.num_samples)
    sources = sources_of(ids)
    for k, size in enumerate(SIZES):
        own = ids[sources == k] - OFFSETS[k]
        assert own.tolist() == Shuffled(5, size, stream=(k, 2)).ids(0, len(own)).tolist()
        assert len(own) == 3 * order.counts[k]
    for place in (0, 1, 700, 1023, 1024, 1025, order.num_samples, order.num_samples + 5, 3 * order.num_samples - 1):
        taken = order.before(place)
        assert list(taken.counts) == np.bincount(sources[:place], minlength=3).tolist()
        assert not len(taken.further)


def test_where_an_epoch_of_a_mixture_ends():
    # For each sample of source 2 there are 50 of source 0 and 20 of source 1: it is out at 7, with about 350 and 140.
    stop = Mixed(0, SIZES, RATES, "stop").counts
    assert stop[2] == 7
    assert abs(stop[0] - 350) <= 25  # half of what comes with one more of source 2, as counts are rounded
    assert abs(stop[1] - 140) <= 10
    # Source 1 lasts longest: 300 of it come with 750 and 15.
    repeat = Mixed(0, SIZES, RATES, "repeat").counts
    assert repeat[1] == 300
    assert abs(repeat[0] - 750) <= 2
    assert repeat[2] == 15
    assert tuple(Mixed(0, SIZES, RATES, "drop").counts) == SIZES


def test_shares_are_exact_in_every_block():
    order = Mixed(0, [10**6, 10**6, 10**6], [0.5, 0.3, 0.2], "repeat")
    sources = order.ids(0, 5 * 1024) // 10**6
    for end in range(1024, 5 * 1024 + 1, 1024):
        found = np.bincount(sources[:end], minlength=3)
        assert np.abs(found - np.array([0.5, 0.3, 0.2]) * end).max() <= 1
    # Within a block they are shuffled, not dealt out in turn.
    assert len({tuple(sources[i : i + 10]) for i in range(0, 1000, 10)}) > 50


def test_dropped_sources_leave_their_places_to_the_others():
    order = Mixed(0, [4000, 1000], [1.0, 1.0], "drop")
    sources = order.ids(0, 5000) >= 4000
    assert sources[:1024].sum() == 512
    assert sources[:2048].sum() == 1000  # it is out within the second block
    assert not sources[2048:].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_of_any_mixture_is_that_of_the_whole(data):
    num = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, 400), min_size=num, max_size=num))
    rates = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=num, max_size=num))
    on_dry = data.draw(st.sampled_from(["stop", "drop"]))
    order = Mixed(1, sizes, rates, on_dry)
    if not order.num_samples:
        return
    whole = order.ids(0, 2 * order.num_samples)
    first = data.draw(st.integers(0, order.num_samples))
    count = data.draw(st.integers(0, order.num_samples))
    assert order.ids(first, count).tolist() == whole[first : first + count].tolist()
    if on_dry == "drop":
        assert sorted(whole[: order.num_samples]) == list(range(sum(sizes)))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    for k in range(num):
        counts = np.cumsum((whole >= offsets[k]) & (whole < offsets[k + 1]))
        assert order.before(first + 1).counts[k] == counts[first]


@pytest.mark.parametrize("num", [1, 31, 32, 100, 5000])
def test_grouped_epochs_have_the_samples_of_the_plain_ones(num):
    lengths = np.random.default_rng(0).integers(1, 1000, num)
    plain, grouped = Shuffled(2, num), Grouped(2, Shuffled(2, num), lengths)
    mine, theirs = grouped.ids(0, 2 * num), plain.ids(0, 2 * num)
    assert sorted(mine[:num]) == sorted(mine[num:]) == list(range(num))
    assert grouped.ids(num // 2, num).tolist() == mine[num // 2 : num // 2 + num].tolist()
    assert sorted(mine[: min(num, 2048)]) == sorted(theirs[: min(num, 2048)])
    for place in {0, 1, num // 2, num, num + num // 3}:
        taken = grouped.before(place)
        came = np.concatenate([plain.ids(0, taken.counts[0]), taken.further])
        assert sorted(came) == sorted(mine[:place])
        assert len(taken.further) < 2048


def test_samples_beside_each_other_are_of_like_length():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64)

    def padding(order):
        rows = lengths[order.ids(0, 20_000)].reshape(-1, 32)
        return 1 - rows.sum() / (rows.max(axis=1) * 32).sum()

    plain = Shuffled(0, 20_000)
    assert padding(plain) > 0.7
    assert padding(Grouped(0, plain, lengths)) < 0.2
    means = lengths[Grouped(0, plain, lengths).ids(0, 2048)].reshape(-1, 32).mean(axis=1)
    assert not (np.diff(means) > 0).all()  # not from short to long


def test_by_rate():
    # Times of 0: 0.5/2, 1.5/2, 2.5/2; of 1: 0.5, 1.5.
    assert by_rate([3, 2], [2.0, 1.0]).tolist() == [0, 3, 1, 2, 4]
    assert by_rate([], []).tolist() == by_rate([0, 0], [1.0, 1.0]).tolist() == []
