"""Ranks that hold copies of the same values are compared while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.saver import Saver
from dtrain.engine.engine import Saving
from dtrain.engine.state import Progress
from dtrain.errors import DivergedError
from dtrain.strategies.base import Shard
from tests.contract.small import Recipe, Record, make_built, overrides
from tests.processes import run_ranks

STEPS, AT = 4, 2


class _Flip(Record):
    """Changes a bit of one element on one rank, after a step."""

    def __init__(self, built: Any, rank: int, state: str, *, frozen: bool) -> None:
        super().__init__()
        self._built, self._mine, self._state, self._frozen = built, built.comm.rank == rank, state, frozen
        self.name = ""

    def step(self, report: Any) -> None:
        super().step(report)
        if report.step == AT and self._mine:
            part: Iterator[Shard] = (
                self._built.strategy.frozen_shards() if self._frozen else self._built.strategy.shards()
            )
            for shard in part:
                if not self.name and shard.views[self._state].numel():
                    self.name = shard.name
                    view = shard.views[self._state]
                    view.view(torch.int32)[int(view.abs().argmax())] ^= 1 << 20  # rounding may undo a lower one


def _run(
    small: Path, root: Path, typed: list[str], rank: int, state: str, frozen: bool
) -> tuple[str, str, int, list[str]]:
    """What was said, what was changed here, how many steps were trained, and what was saved."""
    built = make_built(small, typed)
    flip = _Flip(built, rank, state, frozen=frozen)
    policy = built.config.checkpoint
    saving = Saving(
        Saver(root, policy, built.comm.sibling()), built.describe({}, {}), 0, at_end=True, stop_on_error=True
    )
    said = ""
    try:
        built.engine.run([flip], Progress(), saving)
    except DivergedError as error:
        said = str(error)
    built.comm.barrier()
    return said, flip.name, len(flip.reports), sorted(path.name for path in root.glob("step-*"))


CASES = {
    "ddp": (2, ["strategy=ddp"], "weight", False),
    "ddp, a moment, three ranks": (3, ["strategy=ddp"], "exp_avg", False),
    "groups of replicas": (4, ["strategy=fsdp2", "strategy.replicas=2"], "weight", False),
    "what is not trained": (2, ["strategy=zero2", "tuning=lora", "tuning.rank=2"], "weight", True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bit_of_one_rank_that_is_another(small: Path, tmp_path: Path, case: str) -> None:
    size, typed, state, frozen = CASES[case]
    typed = overrides(small, Recipe(8, steps=STEPS), *typed, "train.compare_every=3")
    odd = size - 1
    results = run_ranks(_run, small, tmp_path, typed, odd, state, frozen, size=size)
    name = results[odd][1]
    assert name
    for said, _, steps, saved in results:
        assert said == results[0][0]
        assert (steps, saved) == (3, []), "it is found at the third step"
        assert said.startswith("step 3: ranks that are to hold the same values do not: ")
        assert name in said
        assert f"rank {odd} on " in said
        assert ("rank 0 on " in said) == (size != 3 and case != "groups of replicas"), (
            "of two nobody knows which is right"
        )


def test_it_is_found_before_it_is_saved(small: Path, tmp_path: Path) -> None:
    typed = overrides(small, Recipe(8, steps=STEPS), "strategy=ddp", "train.compare_every=100")
    for said, _, steps, saved in run_ranks(_run, small, tmp_path, typed, 1, "weight", False, size=2):
        assert (steps, saved) == (STEPS, [])
        assert said.startswith(f"step {STEPS}: ")


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_nothing_is_found_where_nothing_is_wrong(small: Path, tmp_path: Path, strategy: str) -> None:
    typed = overrides(small, Recipe(8, steps=STEPS), f"strategy={strategy}", "tuning=lora", "tuning.rank=2",
                      "train.compare_every=1")  # fmt: skip
    for said, _, steps, saved in run_ranks(_run, small, tmp_path, typed, -1, "weight", False, size=2):
        assert (said, steps, len(saved)) == ("", STEPS, 1)


def test_never(small: Path, tmp_path: Path) -> None:
    typed = overrides(small, Recipe(8, steps=STEPS), "strategy=ddp", "train.compare_every=0")
    for said, _, steps, saved in run_ranks(_run, small, tmp_path, typed, 1, "weight", False, size=2):
        assert (said, steps, len(saved)) == ("", STEPS, 1)
