"""Which checkpoint a run goes on from, what is passed over, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.resume import Start, choose, find
from dtrain.config.schema import Config
from dtrain.errors import CheckpointError, ConfigError
from dtrain.plan.propose import configure
from dtrain.runs import RunDir
from tests.unit.checkpoint.synthetic import tensors, write

OURS = {"optim": "a.AdamW", "optim.lr": 0.1, "data": "abc", "model.hidden_size": 64, "train.steps": 100}


@functools.cache
def _config(*typed: str) -> Config:
    return configure(["schedule=constant", "train.steps=100", *typed], None)[0]


def _make(run: RunDir, *steps: int, **identity: Any) -> list[Path]:
    return [write(run.checkpoints, step, tensors({"w": (3,)}), identity={**OURS, **identity}) for step in steps]


class _Ear(list):
    """Hears what is said."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def __contains__(self, part: object) -> bool:
        return any(str(part) in line for line in self)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "r")


@pytest.fixture
def heard() -> _Ear:
    return _Ear()


def test_nothing_to_go_on_from(run: RunDir, heard: _Ear) -> None:
    assert choose(run, _config(), OURS, heard) is None
    run.checkpoints.mkdir(parents=True)
    assert choose(run, _config(), OURS, heard) is None
    assert heard == []


def test_a_name_in_allow_is_looked_at_where_there_is_nothing_to_go_on_from(run: RunDir, heard: _Ear) -> None:
    assert choose(run, _config("resume.allow=[optim,data,optim.lr]"), OURS, heard) is None
    with pytest.raises(ConfigError, match=r"resume\.allow=optm: not one of the keys that decide the result; did you"):
        choose(run, _config("resume.allow=[optm]"), OURS, heard)


def test_the_newest_first(run: RunDir, heard: _Ear) -> None:
    folders = _make(run, 5, 20, 10)
    assert choose(run, _config(), OURS, heard) == Start((folders[1], folders[2], folders[0]), 20)
    assert f"going on from {folders[1]}" in heard
    assert "made by some on 2 ranks" in heard


def test_what_is_not_whole_is_passed_over_aloud(run: RunDir, heard: _Ear) -> None:
    folders = _make(run, 5, 10, 15, 20)
    (folders[3] / "manifest.json").unlink()
    (folders[2] / "rank-00000.safetensors").write_bytes(b"")
    start = choose(run, _config(), OURS, heard)
    assert start is not None
    assert (start.candidates, start.step) == ((folders[1], folders[0]), 10)
    assert f"passed over {folders[3]}: {folders[3]}/manifest.json: missing" in heard
    assert f"passed over {folders[2]}: {folders[2]}/rank-00000.safetensors: has 0 bytes instead of" in heard


def test_none_is_whole(run: RunDir, heard: _Ear) -> None:
    folders = _make(run, 5, 10)
    for folder in folders:
        (folder / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        choose(run, _config(), OURS, heard)
    for part in (
        "none of its checkpoints is whole",
        *(f"  {folder}/rank-00000.safetensors: missing" for folder in folders),
    ):
        assert part in str(error.value)


def test_another_run_to_start_from_until_there_is_an_own(run: RunDir, tmp_path: Path, heard: _Ear) -> None:
    other = RunDir(tmp_path / "other")
    theirs = _make(other, 30, 40)
    config = _config(f"resume={other.path}")
    assert choose(run, config, OURS, heard) == Start((theirs[1], theirs[0]), 40)
    assert f"starting from {theirs[1]}" in heard
    mine = _make(run, 7)
    assert choose(run, config, OURS, heard) == Start((mine[0],), 7)


def test_what_a_path_names(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = _make(run, 5, 10)
    run.config.write_text("")
    run.write_manifest({})  # of the run, not of a checkpoint
    assert find(run.path) == [new, old]
    assert find(run.checkpoints) == [new, old]
    assert find(old) == [old]
    (run.checkpoints / "mine").write_text(f"{old.name}\n")
    (run.checkpoints / "link").symlink_to(old.name)
    assert find(run.checkpoints / "mine") == [old]
    assert find(run.checkpoints / "link") == [run.checkpoints / "link"]
    for text in ("", "step-00000099", f"../checkpoints/{old.name}", "\0"):
        (run.checkpoints / "mine").write_text(text)
        with pytest.raises(CheckpointError, match="mine: a file that names no checkpoint beside it"):
            find(run.checkpoints / "mine")
    copy = old.rename(tmp_path / "kept")
    assert find(copy) == [copy]
    (new / "manifest.json").unlink()
    assert find(new) == [new]  # what is wrong with it is told by who reads it
    for none in (tmp_path / "none", run.checkpoints / "step-00000099", run.path / "logs"):
        with pytest.raises(CheckpointError, match="no checkpoint, and no run that has any"):
            find(none)


def test_a_named_one_that_is_not_whole(run: RunDir, tmp_path: Path, heard: _Ear) -> None:
    (folder,) = _make(RunDir(tmp_path / "other"), 30)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=rf"resume\.path={folder}: not whole[^\n]*\n.*manifest\.json: missing"):
        choose(run, _config(f"resume={folder}"), OURS, heard)


@pytest.mark.parametrize("steps", ["x", None, [1], 1.5])
def test_a_number_of_steps_that_is_none_is_a_difference(run: RunDir, heard: _Ear, steps: Any) -> None:
    _make(run, 10, **{"train.steps": steps})
    with pytest.raises(ConfigError, match=re.escape(f"train.steps: was {steps}, is 100")):
        choose(run, _config("schedule=cosine"), OURS, heard)


def test_differences_are_refused_and_the_words_to_allow_them_work(run: RunDir, heard: _Ear) -> None:
    (folder,) = _make(run, 10)
    now = {**OURS, "optim.lr": 0.2, "data": "xyz", "optim.new": 1}
    del now["model.hidden_size"]
    with pytest.raises(ConfigError) as error:
        choose(run, _config(), now, heard)
    said = str(error.value)
    for part in (str(folder), "  optim.lr: was 0.1, is 0.2", "  data: was abc, is xyz", "  optim.new: was None, is 1",
                 "  model.hidden_size: was 64, is None"):  # fmt: skip
        assert part in said
    typed = re.search(r"type '(resume\.allow=\[.*\])'", said)
    assert typed is not None
    start = choose(run, _config(typed[1]), now, heard)
    assert start is not None
    assert len(start.differences) == 4
    assert "allowed: optim.lr: was 0.1, is 0.2" in heard


def test_allowed_by_key_or_group_and_nothing_besides(run: RunDir, heard: _Ear) -> None:
    _make(run, 10)
    now = {**OURS, "optim.lr": 0.2, "data": "xyz"}
    for allow in ("optim,data", "optim.lr,data"):
        start = choose(run, _config(f"resume.allow=[{allow}]"), now, heard)
        assert start is not None
        assert start.differences == ("optim.lr: was 0.1, is 0.2", "data: was abc, is xyz")
    with pytest.raises(ConfigError) as error:
        choose(run, _config("resume.allow=[data]"), now, heard)
    assert "optim.lr" in str(error.value)
    assert "xyz" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("optm", "; did you mean `optim`?"), ("strategy", ""), ("optim.lrr", "; did you mean")]
)
def test_unknown_names_in_allow(run: RunDir, heard: _Ear, name: str, hint: str) -> None:
    _make(run, 10)
    with pytest.raises(
        ConfigError, match=re.escape(f"resume.allow={name}: not one of the keys that decide the result{hint}")
    ):
        choose(run, _config(f"resume.allow=[{name}]"), OURS, heard)


@pytest.mark.parametrize(("schedule", "longer"), [
    (["schedule=constant"], True),
    (["schedule=wsd", "schedule.decay_fraction=0.2"], True),
    (["schedule=cosine"], False),
])  # fmt: skip
def test_a_longer_run(run: RunDir, heard: _Ear, schedule: list[str], longer: bool) -> None:
    """Step 80 of 100 is before the decay of wsd, but not of cosine."""
    _make(run, 80)
    config, now = _config(*schedule, "train.steps=200"), {**OURS, "train.steps": 200}
    if longer:
        start = choose(run, config, now, heard)
        assert start is not None
        assert (start.step, start.differences) == (80, ())
    else:
        with pytest.raises(ConfigError, match=r"train\.steps: was 100, is 200"):
            choose(run, config, now, heard)


def test_older_ones_of_another_mathematics_are_no_candidates(run: RunDir, heard: _Ear) -> None:
    """They were made before a difference was allowed once."""
    _make(run, 5, data="before")
    newest, middle = _make(run, 20, 10)
    assert choose(run, _config(), OURS, heard) == Start((newest, middle), 20)


def test_of_another_choice_its_keys_are_not_listed(run: RunDir, heard: _Ear) -> None:
    _make(run, 5)
    now = {**OURS, "optim": "a.Other", "optim.lr": 0.2, "optim.momentum": 0.9, "data": "abd"}
    with pytest.raises(ConfigError, match=r"type 'resume.allow=\[optim,data\]'") as caught:
        choose(run, _config(), now, heard)
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "optim: was a.AdamW, is a.Other", "data: was abc, is abd",
    ]  # fmt: skip
    assert choose(run, _config("resume.allow=[optim,data]"), now, heard) is not None
