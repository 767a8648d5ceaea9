from __future__ import annotations

from pathlib import Path

import numpy as np

from dtrain.data.loader import Loader
from dtrain.data.longest import LongestFirst
from dtrain.data.rows import Row
from dtrain.data.store import MixedStore, RowStore, write_rows
from dtrain.plan.batch import BatchPlan

LENGTHS = [3, 9, 4, 7, 9, 2]


def store(path: Path, lengths: list[int]) -> RowStore:
    rows = [Row(np.arange(n, dtype=np.int32), np.arange(n) > 0, np.array([n], np.int32)) for n in lengths]
    write_rows(path, rows, packed=False)
    return RowStore(path)


def test_the_first_batch_is_the_longest_rows_and_the_same_ones_come_after_all_others(tmp_path: Path) -> None:
    rows = LongestFirst(store(tmp_path / "a.arrow", LENGTHS))
    order = rows.order(7)
    assert order.ids(0, 8).tolist() == [1, 4, 3, 2, 0, 5, 1, 4]
    assert order.num_samples == len(rows) == 6
    assert rows.first(3).tolist() == [1, 4, 3]
    loader = Loader(rows, BatchPlan(2, 1, 1), rank=0, seed=7, pad_id=0)
    assert sorted(int(i) for batch in loader.window(0) for i in batch.sample_ids) == [1, 4]
    assert loader.consumed(3) == {"all": {"samples": 3, "tokens": 25}}


def test_of_a_mixture_whichever_source_they_are_of(tmp_path: Path) -> None:
    sources = {name: store(tmp_path / f"{name}.arrow", lengths) for name, lengths in (("a", [3, 9]), ("b", [5, 2]))}
    rows = LongestFirst(MixedStore(sources, {"a": 1.0, "b": 1.0}, "stop"))
    assert rows.order(7).ids(0, 4).tolist() == [1, 2, 0, 3]
    assert len(rows.row(2).tokens) == 5
    loader = Loader(rows, BatchPlan(2, 2, 1), rank=0, seed=7, pad_id=0)
    assert loader.consumed(2) == {"a": {"samples": 1, "tokens": 9}, "b": {"samples": 1, "tokens": 5}}
