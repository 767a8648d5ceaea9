import pickle

import numpy as np
import pytest

from dtrain.data.rows import Row
from dtrain.data.store import RowStore, write_rows
from dtrain.errors import DataError


def rows(num):
    rng = np.random.default_rng(0)
    for i in range(num):
        length = int(rng.integers(2, 9))
        targets = rng.integers(0, 2, length).astype(bool)
        yield Row(np.full(length, i, np.int32), targets, np.array([1, length - 1], np.int32))


@pytest.mark.parametrize("max_length", [1024, 2**19, 2**21])  # a chunk is 1024 rows, 2 and 1
@pytest.mark.parametrize("num", [0, 1, 2, 1024, 2500])
def test_rows_come_back(tmp_path, num, max_length):
    path = tmp_path / "rows.arrow"
    assert write_rows(path, rows(num), max_length=max_length) == num
    store = pickle.loads(pickle.dumps(RowStore(path)))
    assert len(store) == num
    written = list(rows(num))
    for i in {0, num // 2, num - 1} & set(range(num)):
        found = store.row(i)
        assert found.tokens.tolist() == written[i].tokens.tolist()
        assert found.targets.tolist() == written[i].targets.tolist()
        assert found.lengths.tolist() == written[i].lengths.tolist()
        assert (found.tokens.dtype, found.targets.dtype, found.lengths.dtype) == (np.int32, np.bool_, np.int32)
    assert store.num_targets.tolist() == [row.num_targets for row in written]
    assert store.lengths.tolist() == [len(row.tokens) for row in written]
    with pytest.raises(IndexError):
        store.row(num)


def test_a_row_is_a_view(tmp_path):
    write_rows(tmp_path / "rows.arrow", rows(3))
    store = RowStore(tmp_path / "rows.arrow")
    assert not store.row(1).tokens.flags.writeable
    assert np.shares_memory(store.row(1).tokens, store.row(1).tokens)
    assert np.shares_memory(store.row(1).targets, store.row(1).targets)


@pytest.mark.parametrize("content", [b"", b"not arrow at all"])
def test_not_a_store(tmp_path, content):
    (tmp_path / "rows.arrow").write_bytes(content)
    with pytest.raises(DataError, match="not a file of prepared rows"):
        RowStore(tmp_path / "rows.arrow")
    with pytest.raises(DataError, match=r"rows\.arrow"):
        RowStore(tmp_path / "none" / "rows.arrow")
