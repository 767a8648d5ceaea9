"""Documents of one example stay together: when they are packed, cut, written and read, and in a micro-batch."""

import numpy as np
import pytest

from dtrain.data.counts import CUT_OFF, CUT_OFF_LEARNED, Counts
from dtrain.data.encode import Limit, _fit
from dtrain.data.rows import Row
from dtrain.data.store import RowStore, write_rows
from dtrain.datasets.badrows import BadRowError
from dtrain.objectives._documents import LABELS, LEARNED, OTHER, by_document, in_turn, part
from dtrain.objectives.dpo import DPO
from tests.unit.data.test_template import prepared


def row(lengths, read, labels=()):
    """Documents of 100, 101, ..., 200, 201, ... of which the first `read` tokens are not learned."""
    tokens = np.concatenate([100 * (k + 1) + np.arange(n) for k, n in enumerate(lengths)])
    targets = np.concatenate([np.arange(n) >= read for n in lengths])
    return Row(tokens.astype(np.int32), targets, np.array(lengths, np.int32), np.array(labels, np.int32))


def test_a_pair_that_is_too_long_is_cut_to_one_length_and_keeps_its_prompt():
    # 12 tokens are too many for 9: with at most 5 of each, 5 + 4 fit; the 3 that go were all to be learned.
    counts = Counts()
    (cut,) = _fit(row([8, 4], read=2), Limit(9, "truncate"), "a:1", counts)
    assert cut.tokens.tolist() == [100, 101, 102, 103, 104, 200, 201, 202, 203]
    assert cut.targets.tolist() == [False, False, True, True, True, False, False, True, True]
    assert cut.lengths.tolist() == [5, 4]
    assert counts.reasons == {"truncated together to 9 tokens": 1, CUT_OFF: 3, CUT_OFF_LEARNED: 3}


def test_a_pair_whose_prompt_takes_all_is_left_out_and_counted():
    counts = Counts()
    assert _fit(row([8, 4], read=3), Limit(6, "truncate"), "a:1", counts) == []
    assert counts.reasons == {"left out: what comes before the replies takes all of 6 tokens": 1}


def test_a_pair_is_never_split():
    with pytest.raises(BadRowError, match="12 tokens in 2 documents that belong together.*truncate or drop"):
        _fit(row([8, 4], read=2), Limit(9, "split"), "a:1", Counts())


def test_what_is_read_is_cut_where_the_end_is_to_be_kept():
    counts = Counts()
    (cut,) = _fit(row([8], read=6), Limit(5, "truncate", keeps_targets=True), "a:1", counts)
    assert cut.tokens.tolist() == [100, 101, 105, 106, 107]  # the one before what is learned stays
    assert cut.targets.tolist() == [False, False, False, True, True]
    assert counts.reasons == {"truncated to 5 tokens": 1, CUT_OFF: 3}
    assert _fit(row([8], read=2), Limit(5, "truncate", keeps_targets=True), "a:1", counts) == []
    assert counts.reasons["left out: what is learned of it is longer than a row"] == 1


def test_labels_come_back_from_disk(tmp_path):
    rows = [row([3, 2], 1, [4]), row([2], 1, []), row([2, 2, 3, 4], 1, [7, -1])]
    write_rows(tmp_path / "a.arrow", rows)
    store = RowStore(tmp_path / "a.arrow")
    assert [store.row(i).labels.tolist() for i in range(3)] == [[4], [], [7, -1]]


def test_pairs_are_packed_whole(tmp_path):
    said = [{"role": "user", "content": "the cat"}]
    rows = [{"prompt": said, "chosen": [{"role": "assistant", "content": "the dog " * (1 + i % 3)}],
             "rejected": [{"role": "assistant", "content": "the mat"}]} for i in range(9)]  # fmt: skip
    done = prepared("preference", rows, tmp_path, max_length=96)
    assert done.objective == DPO()
    first, again = (prepared("preference", rows, tmp_path, max_length=96, objective=one)
                    for one in (DPO(), DPO(beta=0.5, loss="ipo", reference="copy")))  # fmt: skip
    assert again.dir == first.dir, "the rows do not depend on the loss"
    assert again.objective == DPO(beta=0.5, loss="ipo", reference="copy")
    store = RowStore(done.dir / "train.arrow")
    assert done.num_documents == 9
    lengths = [store.row(i).lengths for i in range(len(store))]
    assert all(len(each) % 2 == 0 for each in lengths)
    assert max(map(len, lengths)) > 2
    assert sum(map(len, lengths)) == 18
    for i in range(len(store)):
        one = store.row(i)
        starts = np.cumsum(one.lengths) - one.lengths
        learned = np.split(one.targets, starts[1:])
        rejected = one.lengths[1::2].tolist()
        assert len(set(rejected)) == 1
        assert all(each.any() and not each[0] for each in learned)


def test_a_micro_batch_of_pairs_counts_them():
    rows = [row([3, 4], 1), row([2, 2, 5, 3], 1)]
    batch = by_document(rows, [5, 6], 9, each=2)
    assert batch.num_targets == 3
    assert batch.about[LEARNED].tolist() == [2, 3, 1, 1, 4, 2]
    assert len(batch.inputs["target_ids"]) == 13
    assert by_document([], [], 9, each=2).num_targets == 0


def test_every_second_document_can_travel_by_itself():
    batch = in_turn([row([3, 4], 1, [1]), row([2, 2, 5, 3], 1, [0, 1])], [5, 6], 9)
    assert (batch.num_targets, batch.num_tokens) == (3, 19)
    assert batch.about[LEARNED].tolist() == [2, 1, 4]
    assert batch.about[LABELS].tolist() == [1, 0, 1]
    other = part(batch, OTHER)
    assert other.about[LEARNED].tolist() == [3, 1, 2]
    assert other.inputs["tokens"].tolist() == [[200, 201, 202, 203, 9], [200, 201, 400, 401, 402]]
    assert batch.inputs["tokens"].tolist() == [[100, 101, 102, 9, 9, 9, 9], [100, 101, 300, 301, 302, 303, 304]]
