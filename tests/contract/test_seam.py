"""What the seam promises besides the numbers: exact masters, live shards, no update on what is not finite."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.data.loader import Loader
from dtrain.models.base import AbstractWeights, ModelBundle
from tests.contract.small import Recipe, make_built, overrides, train
from tests.contract.test_equivalence import STRATEGIES
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks

EACH = pytest.mark.parametrize("strategy", STRATEGIES)


def _options(strategy: str) -> list[str]:
    return [f"strategy={strategy}", *(DIVIDED if strategy == "zero3" else ())]


def _typed(small: Path, strategy: str, *more: str) -> list[str]:
    return overrides(small, Recipe(8, steps=3), *_options(strategy), *more)


def _masters(small: Path, typed: list[str]) -> dict[str, np.ndarray]:
    built = make_built(small, typed)
    return {name: full.numpy() for name, full in built.strategy.full_state()}


@EACH
def test_masters_start_as_the_files_say_in_bf16_too(small: Path, strategy: str) -> None:
    # DeepSpeed alone would copy them from the bf16 weights and lose 16 bits of each.
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(small / "model", dtype=torch.float32).named_parameters())
    for got in run_ranks(_masters, small, _typed(small, strategy, "train.precision=bf16"), size=2):
        assert set(got) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value.detach().numpy(), err_msg=name)


def _shards(small: Path, typed: list[str]) -> list[tuple[str, int, int, dict[str, int], int, int]]:
    built = make_built(small, typed)
    built.engine.run([], _progress())
    return [(s.name, s.start, s.views["weight"].numel(), {k: v.numel() for k, v in s.views.items()},
             s.replica, s.replicas)
            for s in built.strategy.shards()]  # fmt: skip


@EACH
def test_shards_cover_every_parameter_once(small: Path, strategy: str) -> None:
    ranks = run_ranks(_shards, small, _typed(small, strategy), size=4)
    shapes = {name: p.numel() for name, p in _model(small).named_parameters()}
    for name, numel in shapes.items():
        # Of ranks that hold the same range, the first speaks for all.
        ranges = sorted((start, start + n) for rank in ranks for (key, start, n, _, replica, _) in rank
                        if key == name and n and replica == 0)  # fmt: skip
        assert [0, *(end for _, end in ranges)] == [*(start for start, _ in ranges), numel], name
    for rank in ranks:
        for _, _, numel, views, _, replicas in rank:
            assert set(views) == {"weight", "exp_avg", "exp_avg_sq"}
            assert set(views.values()) == {numel}
            assert replicas == (4 if strategy == "ddp" else 1)


def _fill_and_read(small: Path, typed: list[str]) -> float:
    """Write a known value through the shards; the model must compute with it."""
    built = make_built(small, typed)
    before = _eval_loss(built)
    for shard in built.strategy.shards():
        shard.views["weight"].zero_()
    built.strategy.refresh()
    after = {name: float(full.abs().max()) for name, full in built.strategy.full_state()}
    assert set(after.values()) == {0.0}
    assert before != pytest.approx(_eval_loss(built))
    return _eval_loss(built)


@EACH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_filled_in_is_what_computes(small: Path, strategy: str, precision: str) -> None:
    # All weights zero: every token is as likely as any other, and the loss is ln 97.
    for loss in run_ranks(_fill_and_read, small, _typed(small, strategy, f"train.precision={precision}"), size=2):
        assert loss == pytest.approx(float(np.log(97)), rel=1e-5)


def _break(small: Path, typed: list[str], what: str) -> tuple[str, bool]:
    from dtrain.errors import NonFiniteError

    built = make_built(small, typed)
    objective, rank = built.engine._objective, built.comm.rank
    calls = iter(range(100))

    def broken(module: Any, batch: Any) -> Any:
        loss = objective(module, batch)
        if next(calls) != 2 or rank != 1:  # the third micro-batch of rank 1
            return loss
        if what == "loss":
            return dataclasses.replace(loss, total=loss.total * float("nan"))
        return dataclasses.replace(loss, total=loss.total + _Poison.apply(loss.total))

    built.engine._objective = broken
    before = {name: full.clone() for name, full in built.strategy.full_state()}
    try:
        built.engine.run([], _progress())
    except NonFiniteError as error:
        after = dict(built.strategy.full_state())
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    raise AssertionError("it went on")


class _Poison(torch.autograd.Function):
    """Zero, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


@EACH
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_stops_every_rank_before_the_update(
    small: Path, strategy: str, what: str, precision: str
) -> None:
    # Global batch 16 on 2 ranks with micro-batches of 2: four on each, of which rank 1 breaks the third.
    typed = overrides(small, Recipe(16, steps=1), *_options(strategy), f"train.precision={precision}")
    results = run_ranks(_break, small, typed, what, size=2)
    for message, unchanged in results:
        assert unchanged
        assert f"the {what} is not finite" in message
        assert "rank 1: rows" in message
        assert ("rank 0: rows" in message) == (what == "gradient")


def _held_gradients(small: Path, typed: list[str]) -> tuple[int, int]:
    """Elements of gradients that stay on this rank after a micro-batch that is not the last, and of its parameters."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, _get_module_fsdp_state

    built = make_built(small, typed)
    strategy, course = built.strategy, built.engine._course
    batch = Loader(built.engine._train_rows, course.batch, rank=built.comm.rank, seed=0, pad_id=0).window(0)[0]
    with strategy.micro(sync=False):
        strategy.backward(built.engine._objective(strategy.module, batch).total)
    states = [_get_module_fsdp_state(module) for module in strategy.module.modules()]
    params = [p for one in states if isinstance(one, FSDPState) and one._fsdp_param_group is not None
              for p in one._fsdp_param_group.fsdp_params]  # fmt: skip
    whole = sum(p.unsharded_accumulated_grad.numel() for p in params if p.unsharded_accumulated_grad is not None)
    divided = sum(p.grad.to_local().numel() for p in strategy.module.parameters() if p.grad is not None)
    return whole + divided, sum(p.to_local().numel() for p in strategy.module.parameters())


def test_sharded_gradients_stay_sharded_between_micro_batches(small: Path) -> None:
    for held, owned in run_ranks(_held_gradients, small, _typed(small, "fsdp2"), size=4):
        assert held == owned


class _Branches(torch.nn.Module):
    """A second branch that some steps do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, both: bool) -> torch.Tensor:
        y = self.first(x)
        return (y + self.second(x) if both else y).square().sum()


class _Ones(AbstractWeights):
    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        return torch.ones(numel)


def _stale_gradient(strategy_name: str, *, by_us: bool) -> float:
    """How far the second branch moves in a step that does not take it. Momentum and decay are off."""
    from dtrain.comm import TorchComm
    from dtrain.config.compose import compose
    from dtrain.config.validate import validate
    from dtrain.plan.world import World
    from dtrain.strategies.base import Optim

    config = validate(
        compose([*_options(strategy_name), "optim.lr=0.1", "optim.weight_decay=0", "optim.betas=[0,0]"]).values
    )
    world = World.from_env("cpu")
    comm = TorchComm(world)
    with torch.device("meta"):
        module = _Branches()
    strategy = config.strategy.build(world, comm, Optim(config.optim, "fp32", 0.0))
    strategy.wrap(ModelBundle(module, [module.first, module.second], _Ones(), str, Path()))
    x = torch.ones(2, 8)
    seen = []
    for both in (True, False):
        seen.append(dict(strategy.full_state())["second.weight"].clone())
        with strategy.micro(sync=True):
            strategy.backward(strategy.module(x, both=both))
        if by_us:
            strategy.step(0.1)
        else:
            strategy._zero.param_groups[0]["lr"] = 0.1
            strategy._engine.step()
    last = dict(strategy.full_state())["second.weight"]
    assert float((seen[1] - seen[0]).abs().max()) > 0.05, "the first step must move it"
    return float((last - seen[1]).abs().max())


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp"])  # which refuses unused parameters
def test_no_gradient_of_an_earlier_step_comes_back(strategy: str) -> None:
    assert run_ranks(functools.partial(_stale_gradient, by_us=True), strategy, size=2) == [0.0, 0.0]


def test_deepspeed_still_needs_its_gradients_cleared() -> None:
    # The day this fails, DeepSpeed has mended it, and strategies/_zero.py need not clear the buffer any more.
    assert min(run_ranks(functools.partial(_stale_gradient, by_us=False), "zero3", size=2)) > 0.01


def _train_with_extensions_in(folder: str, small: Path, typed: list[str]) -> list[str]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    train(small, typed)
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name.startswith("zero")])
def test_no_op_is_compiled_and_a_stale_lock_holds_nobody_up(small: Path, strategy: str, tmp_path: Path) -> None:
    # A builder that was killed leaves such a lock, and whoever wants the op afterwards waits for it for ever.
    op = tmp_path / "deepspeed_shm_comm"
    op.mkdir()
    (op / "lock").touch()
    for files in run_ranks(_train_with_extensions_in, str(tmp_path), small, _typed(small, strategy), size=2):
        assert files == ["deepspeed_shm_comm", "deepspeed_shm_comm/lock"]


def _model(small: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(small / "model", dtype=torch.float32)


def _progress() -> Any:
    from dtrain.engine.state import Progress

    return Progress()


def _eval_loss(built: Any) -> float:
    from dtrain.data.loader import eval_windows
    from dtrain.engine.evaluate import evaluate

    windows = eval_windows(built.engine._eval_rows, built.engine._course.batch, rank=built.comm.rank, pad_id=0)
    return evaluate(windows, built.strategy, built.engine._objective, built.comm)[0]
