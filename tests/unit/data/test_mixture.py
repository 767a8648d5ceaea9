"""Mixtures: what can be typed, what is prepared and cached, and what comes out of them when training."""

import json

import numpy as np
import pytest

from dtrain.config.validate import validate_spec
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.data.prepared import FILES, read_prepared
from dtrain.datasets.files import Files
from dtrain.datasets.mixture import Mixture
from dtrain.datasets.stdlib import Stdlib
from dtrain.errors import ConfigError, DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.pretrain import Pretrain
from dtrain.plan.batch import BatchPlan
from dtrain.templates.jinja import Jinja
from tests.unit.data.fakes import FakeModel


def write(path, num, words):
    rows = [{"text": f"{path.stem} {i} " + "the cat sat on " * words} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """One with ten times the tokens of the other, in documents five times as long."""
    return {"long": write(tmp_path / "long.jsonl", 200, 15), "short": write(tmp_path / "short.jsonl", 100, 3)}


def make(cache, said=None, *, objective=None, **values):
    dataset = Mixture(**{"max_length": 64, **values})
    assert not dataset.problems()
    return prepare(dataset, objective or Auto(), FakeModel(), Jinja(), eval_fraction=0.1, seed=0, cache=cache,
                   say=(said if said is not None else []).append)  # fmt: skip


def sources(files, **weights):
    return {name: {"path": files[name], "weight": weight} for name, weight in weights.items()}


def tokens_of(prepared, samples):
    rows = prepared.rows(FILES[0])
    return Loader(rows, BatchPlan(4, 4, 1), rank=0, seed=0, pad_id=0).consumed(samples)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 5)])
def test_weights_count_tokens_not_rows(tmp_path, files, weights, packing):
    long, short = weights
    prepared = make(
        tmp_path / "cache", sources=sources(files, long=long, short=short), on_dry="repeat", packing=packing
    )
    consumed = tokens_of(prepared, prepared.num_rows)
    share = consumed["long"]["tokens"] / sum(one["tokens"] for one in consumed.values())
    assert share == pytest.approx(long / (long + short), abs=0.01)
    if not packing:  # a row of the one has twice the tokens of the other's
        rows = consumed["long"]["samples"] / prepared.num_rows
        assert rows < share - 0.05
    assert sum(one["samples"] for one in consumed.values()) == prepared.num_rows
    assert sum(one["tokens"] for one in consumed.values()) == pytest.approx(prepared.num_tokens, rel=0.02)
    part = tokens_of(prepared, prepared.num_rows // 3)
    assert part["long"]["tokens"] / sum(one["tokens"] for one in part.values()) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("on_dry", ["stop", "repeat", "drop"])
def test_where_an_epoch_ends(tmp_path, files, on_dry):
    prepared = make(tmp_path / "cache", sources=sources(files, long=1, short=1), on_dry=on_dry)
    rows = prepared.rows(FILES[0])
    seen = np.bincount(rows.order(0).ids(0, prepared.num_rows), minlength=len(rows))
    long, short = np.split(seen, [len(rows.sources["long"])])
    if on_dry == "stop":  # the short one is out first, and the long one not half seen
        assert set(short) == {1}
        assert set(long) == {0, 1}
    elif on_dry == "repeat":
        assert set(long) == {1}
        assert short.min() > 3
    else:
        assert set(seen) == {1}
    assert {source.name: source.num_epoch_rows for source in prepared.sources} == {
        "long": long.sum(),
        "short": short.sum(),
    }
    words = {
        "stop": "first source has been seen whole",
        "repeat": "start again",
        "drop": "every row has been seen once",
    }
    text = "\n".join(prepared.lines())
    assert words[on_dry] in text
    assert f"on_dry={on_dry}" in text
    assert "data:   long: weight 1, 50.0% of the tokens" in text
    assert f"data: documents: {prepared.counts['read']} read" in text
    assert "data:   short: 100 read" in text


def test_each_source_is_prepared_and_kept_by_itself(tmp_path, files):
    cache, said = tmp_path / "cache", []
    first = make(cache, said, sources=sources(files, long=1, short=1))
    assert [line.partition(f" {cache}")[0] for line in said if "preparing" in line] == [
        "data: long: preparing",
        "data: short: preparing",
    ]
    said.clear()
    second = make(cache, said, sources=sources(files, long=2, short=1))
    assert sum("reusing" in line for line in said) == 2
    assert second.dir != first.dir
    assert second.digest != first.digest
    assert make(cache, sources=sources(files, long=1, short=1)) == first
    assert read_prepared(first.dir, first.assets, Auto()) == first
    said.clear()
    write(tmp_path / "short.jsonl", 101, 3)
    third = make(cache, said, sources=sources(files, long=1, short=1))
    assert third.dir != first.dir
    assert "data: long: reusing" in "\n".join(said)
    assert "content of the dataset changed" in next(line for line in said if "short: preparing" in line)
    # Alone, a source is what it is in the mixture.
    said.clear()
    alone = Files(path=files["long"], max_length=64)
    prepare(alone, Auto(), FakeModel(), Jinja(), eval_fraction=0.1, seed=0, cache=cache, say=said.append)
    assert "reusing" in said[-1]


def test_a_lost_source_is_made_anew(tmp_path, files):
    cache, said = tmp_path / "cache", []
    first = make(cache, sources=sources(files, long=1, short=1))
    (cache / first.sources[1].dir / "train.arrow").unlink()
    with pytest.raises(DataError, match=r"not seen whole on .*: train.arrow|train.arrow is missing"):
        read_prepared(first.dir, first.assets, Auto())
    assert make(cache, said, sources=sources(files, long=1, short=1)) == first
    assert "train.arrow is missing" in "\n".join(said)


def test_texts_beside_conversations(tmp_path, files):
    chats = tmp_path / "chats.jsonl"
    message = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
    chats.write_text("".join(json.dumps({"messages": message}) + "\n" for _ in range(50)))
    both = {"chats": {"path": str(chats)}, "long": {"path": files["long"], "weight": 2}}
    prepared = make(tmp_path / "cache", sources=both)
    assert prepared.objective == Auto()
    assert prepared.num_targets < prepared.num_tokens
    with pytest.raises(DataError, match=r"dataset.sources.chats.*pretrain learns plain text"):
        make(tmp_path / "cache", sources=both, objective=Pretrain())


def test_a_source_that_would_never_be_seen_is_refused(tmp_path, files):
    with pytest.raises(DataError, match=r"dataset.sources.long: with dataset.on_dry=stop none of its"):
        make(tmp_path / "cache", sources=sources(files, long=1e-6, short=1))


def test_what_can_be_typed(files):
    mixture = validate_spec("dataset", {"_target_": "dtrain.datasets.mixture.Mixture", "max_length": 32, "on_long": "drop",
                                        "sources": {"a": {"path": files["long"]},
                                                    "b": {"dataset": "stdlib", "weight": 2, "on_long": "split"}}})  # fmt: skip
    parts = mixture.parts()
    assert parts.weights == {"a": 1.0, "b": 2.0}
    assert parts.datasets["a"] == Files(path=files["long"], max_length=32, on_long="drop")
    assert parts.datasets["b"] == Stdlib(max_length=32, on_long="split")
    assert not mixture.problems()


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ({}, "dataset.sources: not given; name them"),
        ({"a": {"path": "none.jsonl"}}, "dataset.sources.a.path=none.jsonl: no such file"),
        ({"a": {"weight": 2}}, "dataset.sources.a.path: not given"),
        ({"a": {"path": "x", "weight": 0}}, "dataset.sources.a.weight=0: not a number above 0"),
        ({"a": {"path": "x", "weight": "much"}}, "dataset.sources.a.weight=much: not a number"),
        ({"a": {"pth": "x"}}, "dataset.sources.a.pth: unknown key; did you mean `path`?"),
        ({"a": {"dataset": "stdlb"}}, "dataset.sources.a.dataset=stdlb: no such choice; did you mean `stdlib`?"),
        ({"a": {"dataset": "mixture"}}, "dataset.sources.a.dataset=mixture: no such choice"),
        ({"a": {"dataset": "stdlib", "max_length": 3}}, "dataset.sources.a.max_length: the same for all rows of a run"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(sources, problem):
    found = Mixture(sources=sources).problems()
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_source_is_a_mapping():
    with pytest.raises(ConfigError, match=r"dataset.sources"):
        validate_spec("dataset", {"_target_": "dtrain.datasets.mixture.Mixture", "sources": {"a": "x.jsonl"}})
