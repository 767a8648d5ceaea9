"""A key that is typed for one choice only chooses it."""

from __future__ import annotations

import pytest

from dtrain.config.compose import compose


@pytest.mark.parametrize(
    ("typed", "chosen"),
    [
        (["dataset.path=a.jsonl"], "files"),
        (["++dataset.path=a.jsonl", "train.steps=3"], "files"),
        (["experiment=smoke", "dataset.path=a.jsonl"], "files"),
        (["dataset=stdlib", "dataset.path=a.jsonl"], "stdlib"),
        (["+dataset=hub", "dataset.path=a.jsonl"], "hub"),
        (["dataset.max_length=64"], "stdlib"),
        (["dataset.sources={a:{path:a.jsonl,weight:2}}"], "mixture"),
        (["dataset.sources.a.path=a.jsonl", "dataset.sources.b.path=b.jsonl"], "mixture"),
    ],
)
def test_a_path_is_of_files(typed, chosen):
    composed = compose(typed)
    assert (composed.chosen["dataset"], composed.problems) == (chosen, [])


def test_what_an_experiment_chooses_stays(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /dataset: hub\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert compose(["experiment=mine", "dataset.path=a"], tmp_path).chosen["dataset"] == "hub"
    (tmp_path / "experiment" / "other.yaml").write_text(text.replace("/dataset: hub", "/strategy: ddp"))
    assert compose(["experiment=other", "dataset.path=a"], tmp_path).chosen["dataset"] == "files"


@pytest.mark.parametrize(("typed", "chosen"), [
    (["model.path=a/b"], "hf"), (["model=llama1b", "model.path=a"], "llama1b"), (["model.hidden=64"], "tiny"),
])  # fmt: skip
def test_a_path_is_of_a_model_of_transformers(typed, chosen):
    composed = compose(typed)
    assert (composed.chosen["model"], composed.problems) == (chosen, [])
