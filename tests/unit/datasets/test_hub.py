"""What the datasets library holds, without a network."""

from __future__ import annotations

import json

import datasets
import pytest

from dtrain.datasets import hub
from dtrain.datasets.base import Chat, Labelled, Text
from dtrain.datasets.hub import Hub
from dtrain.errors import DataError


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub._loaded.cache_clear()
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if shown:
        datasets.enable_progress_bars()


def rows(num=3):
    labels = datasets.ClassLabel(names=["neg", "pos"])
    found = datasets.Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(num)])
    return found.cast_column("label", labels)


def test_a_folder_that_was_saved(tmp_path):
    rows().save_to_disk(tmp_path / "one")
    found = Hub(name=str(tmp_path / "one"))
    assert found.problems() == []
    assert found.notes() == [
        f"{tmp_path}/one[train]: 3 rows",
        "classification rows (text, label) as labelled texts",
    ]
    place = f"{tmp_path}/one[train]:row"
    assert list(found.examples()) == [
        Labelled(f"{place} 1", "row 0", "neg"),
        Labelled(f"{place} 2", "row 1", "pos"),
        Labelled(f"{place} 3", "row 2", "neg"),
    ]


def test_rows_that_were_chosen_before_it_was_saved(tmp_path):
    rows(9).select([4, 1]).save_to_disk(tmp_path / "some")
    assert [example.text for example in Hub(name=str(tmp_path / "some")).examples()] == ["row 4", "row 1"]


def test_splits(tmp_path):
    datasets.DatasetDict(train=rows(), test=rows(5)).save_to_disk(tmp_path / "two")
    assert len(list(Hub(name=str(tmp_path / "two"), split="test").examples())) == 5
    with pytest.raises(
        DataError, match=r"dataset.split=tets: no such split in .*; did you mean `test`\?; there are: `train`, `test`"
    ):
        Hub(name=str(tmp_path / "two"), split="tets").notes()
    rows().save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="dataset.split=test: no such split"):
        Hub(name=str(tmp_path / "one"), split="test").notes()


def test_messages_without_the_nulls_of_columns(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    datasets.Dataset.from_list([{"messages": turns, "tools": None}]).save_to_disk(tmp_path / "chats")
    found = list(Hub(name=str(tmp_path / "chats")).examples())
    assert found == [Chat(f"{tmp_path}/chats[train]:row 1", turns)]


def test_a_folder_of_data_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    found = Hub(name=str(tmp_path / "data"))
    assert list(found.examples()) == [Text(f"{tmp_path}/data[train]:row 1", "a")]
    assert found.digest() == found.digest()


def test_the_digest_of_a_saved_folder_is_of_its_content(tmp_path):
    rows().save_to_disk(tmp_path / "a")
    rows(4).save_to_disk(tmp_path / "b")
    assert Hub(name=str(tmp_path / "a")).digest() == Hub(name=str(tmp_path / "a")).digest()
    assert Hub(name=str(tmp_path / "a")).digest() != Hub(name=str(tmp_path / "b")).digest()


def test_what_is_not_there(tmp_path):
    assert Hub(name="???").problems() == [
        "dataset.name: not given; name a folder, or a dataset on the hub, as in dataset.name=tatsu-lab/alpaca"
    ]
    assert Hub(name=str(tmp_path / "none")).problems() == [f"dataset.name={tmp_path}/none: no such folder"]
    with pytest.raises(DataError) as caught:
        Hub(name="somebody/something").notes()
    assert str(caught.value).startswith(
        "dataset.name=somebody/something: the hub cannot be reached, and it is not in the cache here: "
    )
    assert str(caught.value).endswith("save it by save_to_disk(FOLDER), then type dataset.name=FOLDER")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset.name=.*empty: "):
        Hub(name=str(tmp_path / "empty")).notes()
