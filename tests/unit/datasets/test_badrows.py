"""Rows that are wrong: told together, or counted."""

from __future__ import annotations

import pytest

from dtrain.datasets.badrows import BadRowError, BadRows
from dtrain.datasets.base import Skipped
from dtrain.errors import DataError


def test_reasons_are_without_details_and_numbers():
    assert BadRowError("not JSON: Expecting value at column 3").reason == "not JSON"
    assert BadRowError("message 12 is a list instead of an object").reason == "message N is a list instead of an object"
    assert BadRowError("`text` is empty").reason == "`text` is empty"
    assert BadRowError("not GB18030: byte 3").reason == "not GB18030"


def test_counts_by_reason_with_the_first_places():
    bad = BadRows("skip", 0.5)
    for i in range(7):
        assert bad.add(f"a:{i}", BadRowError(f"`text` is {i} words")) == Skipped(
            f"a:{i}", "`text` is N words", bad=True
        )
    bad.count(Skipped("b:1", "not JSON", bad=True))
    assert bad.counts == {"`text` is N words": 7, "not JSON": 1}
    assert bad.places == {"`text` is N words": [f"a:{i}" for i in range(5)], "not JSON": ["b:1"]}
    assert bad.first == [f"a:{i}: `text` is {i} words" for i in range(5)]


@pytest.mark.parametrize(("good", "fails"), [(2, False), (1, True), (0, True)])
def test_more_than_the_fraction_is_an_error(good, fails):
    bad = BadRows("skip", 1 / 3, num_good=good)
    bad.add("a:1", BadRowError("not JSON"))
    if not fails:
        bad.check()
        return
    with pytest.raises(
        DataError,
        match=r"dataset.max_bad_fraction=0.33\d+: 1 of \d rows are bad, which is \d+.0%; repair them, or raise it:",
    ):
        bad.check()


def test_nothing_bad_is_no_error():
    BadRows("error").check()
    BadRows("skip", 0.0).check()
