"""What a strategy's options and hard cases do to the numbers: nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.contract.small import Recipe, Trained, overrides, reference, train
from tests.contract.test_equivalence import STRATEGIES, difference
from tests.processes import run_ranks

# The small model's parameters all lie under ZeRO-3's default threshold and would stay whole on every rank.
DIVIDED = (
    "strategy.param_persistence_threshold=0",
    "strategy.max_reuse_distance=0",
    "strategy.max_live_parameters=4000",
)


def _check(small: Path, recipe: Recipe, typed: list[str], size: int, *, rel: float = 1e-5) -> None:
    expected = reference(small, recipe)
    for got in run_ranks(train, small, typed, size=size):
        assert got.losses == pytest.approx(expected.losses, rel=rel)
        assert got.norms == pytest.approx(expected.norms, rel=rel)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=rel)
        for name, weight in expected.weights.items():
            assert difference(got.weights[name], weight) < rel, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputed_activations_and_idle_ranks(small: Path, strategy: str) -> None:
    # 3 samples on 4 ranks: the last rank has none in any step, and runs idle micro-batches all the same.
    recipe = Recipe(3)
    typed = overrides(small, recipe, f"strategy={strategy}", "train.activation_checkpointing=true")
    _check(small, recipe, typed, 4)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy=fsdp2", "strategy.replicas=2"),
        ("strategy=fsdp2", "strategy.replicas=4"),
        ("strategy=fsdp2", "strategy.reshard_after_forward=false"),
        ("strategy=zero3", *DIVIDED),
        ("strategy=zero3", *DIVIDED, "train.activation_checkpointing=true"),
        ("strategy=zero3", *DIVIDED, "strategy.offload_optimizer=cpu", "strategy.offload_param=cpu"),
        ("strategy=zero2", "strategy.offload_optimizer=cpu"),
        ("strategy=zero1", "strategy.offload_optimizer=cpu"),
        ("strategy=zero2", "strategy.reduce_bucket_size=500", "strategy.allgather_bucket_size=500"),
        ("strategy=zero3", *DIVIDED, "strategy.sub_group_size=3000"),
    ],
    ids=lambda options: ",".join(one.split(".")[-1] for one in options),
)
def test_options_change_no_number(small: Path, options: tuple[str, ...]) -> None:
    recipe = Recipe(7)
    _check(small, recipe, overrides(small, recipe, *options), 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_clipping(small: Path, strategy: str) -> None:
    recipe = dataclasses.replace(Recipe(8), grad_clip=0.0)
    expected = reference(small, dataclasses.replace(recipe, grad_clip=1e9))
    got: Trained = run_ranks(train, small, overrides(small, recipe, f"strategy={strategy}"), size=2)[0]
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert got.norms == pytest.approx(expected.norms, rel=1e-5)
