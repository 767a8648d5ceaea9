"""Which rows are held out is said by their text alone: not by their order, their files or the format of these."""

from __future__ import annotations

import csv
import random

from tests.unit.data.test_prepare import documents, make, texts, write


def test_held_out_rows_are_the_same_in_any_order_and_format(tmp_path):
    rows = texts(150)
    cache, settings = tmp_path / "cache", {"eval_fraction": 0.2, "max_length": 512}
    held = sorted(documents(make(write(tmp_path / "a.jsonl", rows), cache, **settings), "eval"))
    assert 15 < len(held) < 45
    random.Random(7).shuffle(rows)
    assert sorted(documents(make(write(tmp_path / "b.jsonl", rows), cache, **settings), "eval")) == held
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["number", "text"], *([i, row["text"]] for i, row in enumerate(rows))])
    assert sorted(documents(make(tmp_path / "c.csv", cache, **settings), "eval")) == held
    (tmp_path / "d").mkdir()
    for i in range(3):
        write(tmp_path / "d" / f"{i}.jsonl", rows[i::3])
    assert sorted(documents(make(tmp_path / "d", cache, **settings), "eval")) == held
