"""The factor of the learning rate, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.schedules.constant import Constant
from dtrain.schedules.cosine import Cosine
from dtrain.schedules.linear import Linear
from dtrain.schedules.wsd import WSD


def _factors(schedule, steps: int) -> list[float]:
    return [schedule.factor(step, steps) for step in range(steps)]


def test_constant() -> None:
    assert _factors(Constant(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert _factors(Constant(), 3) == [1, 1, 1]


def test_linear() -> None:
    # Two steps of warm-up, then from 1 by fifths towards 0, which it would reach after the last step.
    assert _factors(Linear(warmup_steps=2), 7) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert _factors(Linear(min_factor=0.5), 4) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_cosine() -> None:
    half = math.sqrt(0.5)
    assert _factors(Cosine(), 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert _factors(Cosine(warmup_steps=1, min_factor=0.1), 3) == pytest.approx([1, 1, 0.55])


def test_wsd() -> None:
    # 10 steps, 2 of warm-up, the last 4 in a straight line to 0.
    assert _factors(WSD(warmup_steps=2, decay_fraction=0.4), 10) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert _factors(WSD(decay_fraction=0.0), 3) == [1, 1, 1]
    assert _factors(WSD(decay_fraction=1.0, min_factor=0.5), 2) == [1, 0.75]


@given(
    kind=st.sampled_from([Constant, Linear, Cosine, WSD]), warmup_steps=st.integers(0, 50), steps=st.integers(1, 200)
)
def test_never_beyond_the_peak(kind, warmup_steps: int, steps: int) -> None:
    factors = _factors(kind(warmup_steps=warmup_steps), steps)
    assert all(0 < factor <= 1 for factor in factors)
    rising = factors[: min(warmup_steps, steps)]
    assert kind is WSD or rising == sorted(rising)
    falling = factors[warmup_steps:]
    assert falling == sorted(falling, reverse=True)
