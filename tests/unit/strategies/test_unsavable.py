"""State on NVMe is DeepSpeed's alone: the plan says that nothing is saved, and nothing is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.checkpoint.resume import choose
from dtrain.config.compose import choices
from dtrain.errors import ConfigError
from dtrain.plan.propose import configure, propose
from dtrain.runs import RunDir
from tests.unit.checkpoint.synthetic import tensors, write

NVME = ["strategy=zero3", "strategy.nvme_path=/disk"]


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_the_plan_says_that_nothing_is_saved(key: str) -> None:
    notes = propose([*NVME, f"strategy.{key}=nvme"], None).plan.notes
    (note,) = [one for one in notes if "saved" in one]
    assert note == (f"strategy.{key}=nvme: DeepSpeed alone reads and writes what it keeps there, so that nothing is saved; "
                    f"a run that ends early starts from the first step")  # fmt: skip


@pytest.mark.parametrize("name", [*choices()["strategy"], "zero3 strategy.offload_optimizer=cpu"])
def test_others_are_saved(name: str) -> None:
    proposal = propose(f"strategy={name}".split(), None)
    assert not [note for note in proposal.plan.notes if "saved" in note]
    assert proposal.config.strategy.unsavable() is None


def test_a_checkpoint_is_refused(tmp_path: Path) -> None:
    own, other = RunDir(tmp_path / "own"), RunDir(tmp_path / "other")
    config = configure([*NVME, "strategy.offload_optimizer=nvme", f"resume={other.path}"], None)[0]
    for run in (other, own):  # the other run's first, then its own
        folder = write(run.checkpoints, 5, tensors({"w": (3,)}))
        with pytest.raises(ConfigError) as error:
            choose(own, config, {"optim.lr": 0.1, "data": "abc"}, [].append)
        assert str(error.value).startswith("strategy.offload_optimizer=nvme: DeepSpeed alone")
        assert f"cannot go on from {folder}; take another strategy" in str(error.value)
