"""The table names tests that there are, and the page has its rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import pytest

from tests.faults.table import ROOT, ROWS, Ran, Row, line, page, whole_names, written
from tests.processes import run_ranks


def test_every_row_names_its_tests_or_says_why_not() -> None:
    assert list(ROWS) == [str(number) for number in range(1, len(ROWS) + 1)]
    assert len(ROWS) >= 48
    for number, row in ROWS.items():
        assert row.shown or row.missing, number
        for prefix in row.shown:
            path = prefix.partition("::")[0]
            assert (ROOT / path).is_file(), prefix
            assert whole_names([prefix.partition("[")[0]]), prefix


def _ids(files: Sequence[str]) -> list[str]:
    """Of all tests in these files, parameters included, as `make faults` has them."""
    found: list[str] = []

    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(item.nodeid for item in session.items)

    os.environ["DTRAIN_FAULTS"] = "all"
    os.chdir(ROOT)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[Collected()])
    assert code == 0, code
    return found


def test_parameters_that_are_written_out_are_there() -> None:
    """Collected in a process of its own, which has torch from its parent."""
    named = [one for row in ROWS.values() for one in row.shown if "[" in one]
    assert named
    (found,) = run_ranks(_ids, sorted({one.partition("::")[0] for one in named}), size=1)
    for one in named:
        assert one in found if one.endswith("]") else any(name.startswith(one) for name in found), one


def test_the_page_has_every_row() -> None:
    text = written()
    for number, row in ROWS.items():
        assert f"\n| {number} | {row.fault} | {row.expected} | " in text


def test_what_was_not_as_expected_stands_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "1": Row("a", "b", ("t.py::one",)),
        "2": Row("c", "d", ("t.py::two",)),
        "3": Row("e", "f", (), "there is none"),
    }
    monkeypatch.setattr("tests.faults.table.ROWS", rows)
    tests = {
        "t.py::one[0]": Ran(measured={"detected_s": 0.24, "lost_steps": 2}),
        "t.py::one[1]": Ran("failed", measured={"detected_s": 1.26}),
        "t.py::two": Ran("skipped", "Skipped: no mount"),
    }
    lines = [line(number, tests, {"3": "x"}) for number in rows]
    assert lines == [
        "| 1 | a | b | **not as expected** in 1 of 2 tests | 1.3 | 2 |  |",
        "| 2 | c | d | not run here: no mount |  |  |  |",
        "| 3 | e | f | not shown: there is none |  |  | x |",
    ]
    assert ": 0 of 3 rows are shown, 0 in part." in page(lines, "")
    tests["t.py::one[1]"].outcome = "passed"
    assert ": 1 of 3 rows are shown, 0 in part." in page([line(number, tests, {}) for number in rows], "")
