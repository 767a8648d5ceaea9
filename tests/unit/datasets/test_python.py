"""Rows that a function yields."""

from __future__ import annotations

import sys

import pytest

from dtrain.datasets.base import Text
from dtrain.datasets.python import Python
from dtrain.errors import ConfigError, DataError
from dtrain.plan.propose import configure

SOURCE = """
def train(num=2):
    for i in range(num):
        yield {"text": f"row {i}"}

def listed():
    return [{"text": "a"}, "b"]

def breaks():
    yield {"text": "a"}
    raise ValueError("no more")

number = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "dtrain_test_rows"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "rows.py").write_text(SOURCE)
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("dtrain_test_rows")]:
        del sys.modules[name]


def python(name, **values):
    return Python(function=f"dtrain_test_rows.{name}", **values)


def test_rows_of_a_function(package):
    found = python("rows:train")
    assert found.notes() == [
        f"dtrain_test_rows.rows:train in {package}/rows.py; after a change elsewhere, type another dataset.version",
        "text rows (text) as texts",
    ]
    place = "dtrain_test_rows.rows:train:row"
    assert (
        list(found.examples()) == list(found.examples()) == [Text(f"{place} 1", "row 0"), Text(f"{place} 2", "row 1")]
    )
    assert len(list(python("rows:train", args={"num": 5}).examples())) == 5


def test_what_a_function_gets_wrong(package):
    def told(name, **values):
        with pytest.raises(DataError) as caught:
            list(python(name, **values).examples())
        return str(caught.value)

    assert "rows:listed:row 2: a string instead of a dict" in told("rows:listed")
    assert told("rows:breaks") == (
        f"dataset.function=dtrain_test_rows.rows:breaks: ValueError after 1 rows: no more ({package}/rows.py:11)"
    )
    assert "TypeError after 0 rows: " in told("rows:train", args={"size": 3})
    assert told("rows:number").endswith("dtrain_test_rows.rows has no function number")
    assert told("rows:tain").endswith("dtrain_test_rows.rows has no function tain")
    assert told("none:train").endswith("No module named 'dtrain_test_rows.none'")
    assert told("broken:train").endswith(
        f"ZeroDivisionError while it was imported: division by zero ({package}/broken.py:1)"
    )


def test_the_digest_is_of_the_source_file(package):
    before = python("rows:train").digest()
    (package / "__init__.py").write_text("# another file\n")
    assert python("rows:train").digest() == before
    (package / "rows.py").write_text(SOURCE + "# changed\n")
    assert python("rows:train").digest() != before


def test_only_what_was_allowed_is_imported(package):
    typed = ["dataset=python", "dataset.function=dtrain_test_rows.rows:train"]
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ConfigError, match=r"dataset.function=dtrain_test_rows.rows:train: dtrain_test_rows is imported only where "
                                          r"it is allowed; .* type plugins=\[dtrain_test_rows\] on the command line"):  # fmt: skip
        configure(typed, None)
    config, _ = configure([*typed, "plugins=[dtrain_test_rows]", "dataset.args={num: 3}"], None)
    assert config.dataset.args == {"num": 3}


def test_a_name_that_is_none():
    assert Python(function="???").problems() == [
        "dataset.function: not given; name yours, as in dataset.function=my_package.rows:train"
    ]
    for name in ("rows", "rows:", ":train", "rows.train", "os:system()", "a b:c"):
        assert Python(function=name).problems() == [
            f"dataset.function={name}: not module:function, as in my_package.rows:train"
        ]
        assert Python(function=name).packages() == {}
