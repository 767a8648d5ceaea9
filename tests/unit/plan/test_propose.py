"""What a plan assumes of a machine that is not this one, and what it says of weights that were never trained."""

from __future__ import annotations

import pytest

from dtrain.plan.machine import Machine
from dtrain.plan.propose import propose


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.plan.propose.look", lambda: Machine(4, 32 * 2**30, 0, "", 0))


@pytest.mark.parametrize(("typed", "size", "said"), [
    ([], 1, True), (["launcher.procs=8"], 8, False),
    (["launcher=torchrun", "launcher.nodes=2"], 2, True),
    (["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"], 8, False),
])  # fmt: skip
def test_gpus_that_are_not_here(typed: list[str], size: int, said: bool) -> None:
    plan = propose(["device=cuda", *typed], None, elsewhere=True).plan
    assert plan.topology.size == size
    assert any("planned for one GPU" in note for note in plan.notes) == said


@pytest.mark.parametrize(("typed", "said"), [
    (["tuning=lora"], True), ([], False), (["model=llama1b", "tuning=lora", "device=cuda", "launcher.procs=1"], False),
    (["model=llama1b", "model.from_scratch=true", "tuning=lora", "device=cuda", "launcher.procs=1"], True),
])  # fmt: skip
def test_what_is_kept_was_never_trained(typed: list[str], said: bool) -> None:
    notes = propose(typed, None, elsewhere=True).plan.notes
    assert any("what it leaves as it is was never trained" in note for note in notes) == said
