"""Memory runs out in a step: it is done again in smaller micro-batches, with the same rows and the same result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.harness import Fault, launch, rows_of

TYPED = ("train.steps=5", "train.on_oom=smaller_micro_batch", "checkpoint.every_steps=0", "batch.micro_batch=2",
         "optim.eps=1e-4")  # fmt: skip
"""As in the contract tests: with a smaller eps, Adam turns rounding into steps of full size."""
FAULT = Fault(fail="train.backward:oom:rank=1:after=3:attempt=0")
"""At the fourth step: each rank has two samples, one micro-batch of them."""


@pytest.fixture(scope="module")
def small(folder: Path) -> RunDir:
    """The same in micro-batches of 1 from the start."""
    assert launch(folder, "small", *TYPED, "batch.micro_batch=1").code == 0
    return RunDir(folder / "runs" / "small")


def assert_alike(run: RunDir, other: RunDir) -> None:
    """But for rounding: sums over other pieces."""
    here, there = (rows(one.metrics) for one in (run, other))
    assert [row["samples"] for row in here] == [row["samples"] for row in there]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in here], [row[name] for row in there], rtol=1e-5)
    mine, others = (load_file(one.export / "model.safetensors") for one in (run, other))
    for name, weight in others.items():
        np.testing.assert_allclose(mine[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("strategy", "fail"), [
    ("ddp", "train.backward"), ("zero2", "train.forward"), ("zero3", "train.backward"), ("fsdp2", "train.forward"),
])  # fmt: skip
def test_the_step_is_done_again_in_halves(folder: Path, small: RunDir, strategy: str, fail: str) -> None:
    fault = Fault(fail=f"{fail}:oom:rank=1:after=3:attempt=0")
    ended = launch(folder, f"oom-{strategy}", *TYPED, f"strategy={strategy}", fault=fault)
    run = RunDir(folder / "runs" / f"oom-{strategy}")
    assert ended.code == 0, ended.said
    attempts = run.read_manifest()["attempts"]
    assert [(one["ended"], one["micro_batch"], one["first_step"]) for one in attempts] == [
        ("oom", 2, 0),
        ("done", 1, 3),
    ]
    assert "memory did not suffice for micro-batches of 2; it goes on with 1, and the global batch stays 4" in ended.out
    assert_alike(run, small)
    # The rows of the step that was done again, and of all others, are those of a run without.
    whole = [dict(rank) for rank in rows_of(small, 0)]
    for rank, steps in enumerate(rows_of(run, 1)):
        assert [samples for samples, _ in steps][:2] == [12, 16]
        assert all(sorted(whole[rank][samples]) == sorted(ids) for samples, ids in steps if samples < 20)
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".tmp")]


def test_it_stops_with_a_hint_where_that_was_not_asked_for(folder: Path) -> None:
    ended = launch(folder, "oom-stop", *TYPED, "train.on_oom=stop", "launcher.max_restarts=3", fault=FAULT)
    run = RunDir(folder / "runs" / "oom-stop")
    assert ended.code == 3
    assert run.read_outcome().kind == "oom"
    assert "hint: out of memory: batch.micro_batch=1 halves" in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("rank 1 on ")
    assert "in train at step 3: OutOfMemoryError" in last
    assert len(run.read_manifest()["attempts"]) == 1


def test_it_stops_where_no_smaller_one_is_left(folder: Path) -> None:
    ended = launch(folder, "oom-one", *TYPED, "batch.micro_batch=1", fault=FAULT)
    assert ended.code == 3
    assert "train.on_oom=smaller_micro_batch: memory does not suffice for a micro-batch of 1" in ended.out
    assert "hint: out of memory with a micro-batch of 1: train.activation_checkpointing=true" in ended.err


def test_where_nothing_can_be_saved_it_says_so(folder: Path) -> None:
    from dtrain.strategies.ddp import DDP

    def unsavable(self: DDP) -> str:
        return "strategy=ddp: for this test"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDP, "unsavable", unsavable)
        ended = launch(folder, "oom-unsavable", *TYPED, fault=FAULT)
    assert ended.code == 3
    assert "strategy=ddp: for this test, so that the step cannot be done again" in ended.out
