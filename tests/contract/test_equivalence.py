"""The same model whatever the parallelism: every strategy on 1, 2 and 4 ranks against one plain process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtrain.config.compose import choices, compose
from dtrain.config.validate import validate
from tests.contract.small import Recipe, Trained, overrides, reference, train
from tests.processes import run_ranks

STRATEGIES = [name for name in choices()["strategy"]
              if not validate(compose([f"strategy={name}"]).values).strategy.candidates()]  # fmt: skip


_references: dict[int, Trained] = {}


def _expected(small: Path, recipe: Recipe) -> Trained:
    if recipe.global_batch not in _references:
        _references[recipe.global_batch] = reference(small, recipe)
    return _references[recipe.global_batch]


@pytest.mark.parametrize("global_batch", [8, 10, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_equals_one_plain_process(small: Path, strategy: str, size: int, global_batch: int) -> None:
    recipe = Recipe(global_batch)
    expected = _expected(small, recipe)
    assert max(expected.norms) > recipe.grad_clip, "clipping must bite"
    for got in run_ranks(train, small, overrides(small, recipe, f"strategy={strategy}"), size=size):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        assert set(got.weights) == set(expected.weights)
        for name, weight in expected.weights.items():
            assert difference(got.weights[name], weight) < 1e-5, name


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of any element, relative to the tensor's largest."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def _by_strategy(small: Path, *more: str, size: int = 2) -> dict[str, Trained]:
    return {name: run_ranks(train, small, overrides(small, Recipe(8), f"strategy={name}", *more), size=size)[0]
            for name in STRATEGIES}  # fmt: skip


def test_bf16_means_the_same_in_every_strategy(small: Path) -> None:
    # bf16 has 8 bits of mantissa: 2^-8 = 4e-3. Ten steps of the same arithmetic in another order stay near that.
    runs = _by_strategy(small, "train.precision=bf16")
    first = next(iter(runs.values()))
    fp32 = _expected(small, Recipe(8)).losses
    assert first.losses == pytest.approx(fp32, rel=3e-2)
    assert first.losses != pytest.approx(fp32, rel=1e-6), "this was not bf16"
    for name, run in runs.items():
        assert run.losses == pytest.approx(first.losses, rel=4e-3), name
        assert run.norms == pytest.approx(first.norms, rel=4e-2), name
