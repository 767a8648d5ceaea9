"""The example of a network of one's own learns the same under every strategy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtrain.config import frozen
from tests.contract.small import Record
from tests.processes import run_ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"


def _typed(*more: str) -> list[str]:
    return ["plugins=[digits]", "model=python", "model.function=digits:network", "objective=digits", "dataset=python",
            "dataset.function=digits:images", "dataset.packing=false", "batch.global_batch=10", "batch.micro_batch=3", "train.steps=35", "optim.lr=0.02",
            "train.precision=fp32", "device=cpu", "eval.fraction=0.2", "eval.max_rows=null", *more]  # fmt: skip


def _train(assets: Path, rows: tuple[Path, Path], plain: dict[str, Any]) -> tuple[list[float], float, float]:
    sys.path.insert(0, str(EXAMPLE))
    from dtrain.comm import TorchComm
    from dtrain.config.validate import validate
    from dtrain.data.store import RowStore
    from dtrain.engine.build import build
    from dtrain.engine.state import Progress
    from dtrain.plan.world import World

    config = validate(plain, plugins=["digits"])
    world = World.from_env("cpu")
    built = build(config, world, TorchComm(world), assets=assets, pad_id=0,
                  rows=(RowStore(rows[0]), RowStore(rows[1])))  # fmt: skip
    record = Record()
    built.engine.run([record], Progress())
    assert set(record.evals[-1].extras) == set(config.objective.measured)
    return [one.loss for one in record.reports], record.evals[-1].loss, record.evals[-1].extras["accuracy"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """Ten shapes of 64 pixels with noise in place of scikit-learn's digits, prepared; and the configuration."""
    from dtrain.data.prepare import prepare
    from dtrain.data.prepared import FILES
    from dtrain.plan.propose import configure

    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    shapes = draw.integers(0, 17, (10, 64))
    labels = draw.integers(0, 10, 300)
    pixels = np.clip(shapes[labels] + draw.integers(-4, 5, (300, 64)), 0, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        images = SimpleNamespace(data=pixels.astype(float), target=labels)
        patch.setitem(sys.modules, "sklearn", SimpleNamespace())
        patch.setitem(sys.modules, "sklearn.datasets", SimpleNamespace(load_digits=lambda: images))
        config, _ = configure(_typed("strategy=ddp"), EXAMPLE / "conf")
        done = prepare(config.dataset, config.objective, config.model, config.template, eval_fraction=0.2, seed=0,
                       cache=folder / "cache", say=lambda line: None)  # fmt: skip
        yield done.assets, (done.dir / FILES[0], done.dir / FILES[1]), frozen.to_plain(config)


def test_every_strategy_learns_the_same(ready: tuple[Any, ...]) -> None:
    # Not at the top: each rank imports this file, and these compose configurations, which takes seconds.
    from dtrain.config.compose import group_choice
    from tests.contract.test_equivalence import STRATEGIES

    *given, plain = ready
    losses, eval_loss, accuracy = run_ranks(_train, *given, plain, size=1)[0]
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy > 0.9, "of 0.1 by chance"
    for strategy in STRATEGIES:
        for got in run_ranks(_train, *given, plain | {"strategy": group_choice("strategy", strategy)}, size=2):
            assert got[0] == pytest.approx(losses, rel=1e-5), strategy
            assert got[1] == pytest.approx(eval_loss, rel=1e-5), strategy
            assert got[2] == accuracy, strategy
