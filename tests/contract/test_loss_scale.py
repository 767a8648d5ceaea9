"""fp16 without a GPU: the scale of the loss, ours and DeepSpeed's own class, step by step and through a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dtrain.comm import TorchComm
from dtrain.plan.world import World
from dtrain.strategies._scale import LossScale
from dtrain.strategies._zero import _import_deepspeed, restore_scale, scale_counters
from tests.processes import run_ranks

WINDOW = 5


def test_by_hand() -> None:
    scale = LossScale(enabled=True, start=16.0, grow_after=3)
    # Three good steps, and with the fourth it doubles; overflows halve it, and the count begins anew.
    values = [(scale.update(norm), scale.value) for norm in (1.0, 1.0, 1.0, 1.0, 1.0, float("inf"), float("nan"), 1.0)]
    assert values == [(False, 16.0), (False, 16.0), (False, 16.0), (False, 32.0), (False, 32.0), (True, 16.0), (True, 8.0),
                      (False, 8.0)]  # fmt: skip
    assert scale.counters() == {"loss_scale": 8.0, "good_steps": 1}
    fresh = LossScale(enabled=True, start=16.0, grow_after=3)
    fresh.restore(scale.counters())
    assert [(fresh.update(1.0), fresh.value)[1] for _ in range(3)] == [8.0, 8.0, 16.0]


def test_an_overflow_that_no_scale_explains() -> None:
    scale = LossScale(enabled=True, start=2.0)
    assert [scale.update(float("inf")) for _ in range(2)] == [True, False]


def test_without_fp16() -> None:
    scale = LossScale(enabled=False)
    assert scale.counters() == {}
    scale.restore({"loss_scale": 4.0, "good_steps": 2})  # of a checkpoint in fp16
    assert (scale.update(float("inf")), scale.value) == (False, 1.0)


class _Ours:
    def __init__(self) -> None:
        self.scale = LossScale(enabled=True, grow_after=WINDOW)

    def step(self, *, overflow: bool) -> float:
        self.scale.update(float("inf") if overflow else 1.0)
        return self.scale.value

    def counters(self) -> dict[str, float]:
        return self.scale.counters()

    def restore(self, counters: dict[str, float]) -> None:
        self.scale.restore(counters)


class _Theirs:
    def __init__(self) -> None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        self.scaler = DynamicLossScaler(2.0**16, WINDOW, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)

    def step(self, *, overflow: bool) -> float:
        self.scaler.update_scale(overflow)
        return self.scaler.cur_scale

    def counters(self) -> dict[str, float]:
        return scale_counters(self.scaler)

    def restore(self, counters: dict[str, float]) -> None:
        restore_scale(self.scaler, counters)


def _differences(seed: int) -> list[Any]:
    """Between one scale that nobody interrupts and one that goes through checkpoints into ours and theirs by turns."""
    world = World.from_env("cpu")
    TorchComm(world)
    _import_deepspeed(world, on_nvme=False).init_distributed(verbose=False)  # it asks for its rank on an overflow
    draw, found = random.Random(seed), []
    for _ in range(20):
        through: Any = draw.choice([_Ours, _Theirs])()
        stopped: Any = draw.choice([_Ours, _Theirs])()
        for step in range(100):
            if draw.random() < 0.2:
                counters = stopped.counters()
                stopped = draw.choice([_Ours, _Theirs])()
                stopped.restore(counters)
            overflow = draw.random() < 0.1
            one, other = through.step(overflow=overflow), stopped.step(overflow=overflow)
            if one != other or through.counters() != stopped.counters():
                found.append((step, type(through).__name__, type(stopped).__name__, one, other))
                break
    return found


@pytest.mark.parametrize("seed", range(3))
def test_deepspeed_and_we_change_it_at_the_same_steps(seed: int) -> None:
    assert run_ranks(_differences, seed, size=1) == [[]]


def _anew(make: Any) -> list[dict[str, float]]:
    world = World.from_env("cpu")
    TorchComm(world)
    _import_deepspeed(world, on_nvme=False)
    scale, found = make(), []
    for counters in ({"loss_scale": 8.0, "good_steps": 3}, {"updates": 3}):
        scale.restore(counters)
        found.append(scale.counters())
    return found


@pytest.mark.parametrize("make", [_Ours, _Theirs])
def test_a_checkpoint_in_another_precision_has_it_begin_anew(make: Any) -> None:
    """Also where one in fp16 was tried before."""
    eight, first = {"loss_scale": 8.0, "good_steps": 3}, {"loss_scale": 2.0**16, "good_steps": 0}
    assert run_ranks(_anew, make, size=1) == [[eight, first]]
