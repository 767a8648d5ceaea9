"""How long a rank may stay in one place, by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.launchers._watch import FACTOR, LEAST_S, RARE_S, UNKNOWN_S, Watch
from dtrain.runs.pulse import Pulse, read


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def passes(watch: Watch, clock: Clock, seconds: float) -> dict[int, float]:
    """Look each second; what the last look found."""
    found: dict[int, float] = {}
    for _ in range(int(seconds)):
        clock.now += 1
        found = dict(watch.look())
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_word_of_a_rank(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 3)
    pulse("train", 7, range(100))
    (place,) = read(tmp_path) or []
    assert (place.rank, place.phase, place.step, place.rows[:3], place.count) == (3, "train", 7, (0, 1, 2), 1)
    pulse("eval", 8, ())
    assert (read(tmp_path)[0].phase, read(tmp_path)[0].rows) == ("eval", ())
    (tmp_path / "rank-4.json").write_text('{"rank": 4, "ph')
    assert read(tmp_path) is None
    pulse.end()
    pulse("train", 9, ())
    assert [path.name for path in tmp_path.iterdir()] == ["rank-4.json"]


def test_a_word_that_is_half_written_is_no_hang_of_the_others(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, 30.0, clock), Pulse(tmp_path, 0)
    pulse("train", 3, ())
    passes(watch, clock, 29)
    (tmp_path / "rank-1.json").write_text('{"rank": 1, "ph')
    assert passes(watch, clock, 60) == {}
    assert [place.rank for place in watch.places()] == [0]
    (tmp_path / "rank-1.json").unlink()
    assert set(passes(watch, clock, 5)) == {0}


def test_limits_are_learned_from_the_run(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, "auto", clock), Pulse(tmp_path, 0)
    assert [watch.limit(phase) for phase in ("train", "save", "load")] == [UNKNOWN_S, UNKNOWN_S, RARE_S]
    pulse("train", 0, ())
    passes(watch, clock, 120)  # it compiles
    pulse("train", 0, ())
    passes(watch, clock, 1)
    assert watch.limit("train") == pytest.approx(FACTOR * 120, abs=FACTOR)
    passes(watch, clock, 999)
    pulse("train", 1, ())
    watch.look()
    assert watch.limit("train") == pytest.approx(999 + UNKNOWN_S, abs=2)
    for step in range(1, 20):
        pulse("data", step, ())
        passes(watch, clock, 2)
    assert watch.limit("data") == LEAST_S
    assert watch.limit("eval") == UNKNOWN_S


def test_a_long_first_step_is_no_hang_and_a_later_one_is(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, "auto", clock), Pulse(tmp_path, 0)
    pulse("train", 0, ())
    assert passes(watch, clock, UNKNOWN_S - 10) == {}
    watch, other = Watch(tmp_path, "auto", clock), Pulse(tmp_path, 1)
    for step in range(20):
        pulse("train", step, ())
        other("train", step, ())
        passes(watch, clock, 1)
    assert passes(watch, clock, 20) == {}
    other("train", 20, ())
    assert passes(watch, clock, LEAST_S - 15) == {}  # too long for the first, but the other has got on since
    assert set(passes(watch, clock, 20)) == {0, 1}


def test_seconds_hold_for_what_recurs_and_off_for_nothing(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, 30.0, clock), Pulse(tmp_path, 0)
    pulse("load", 0, ())
    assert passes(watch, clock, 200) == {}
    pulse("train", 0, ())
    assert passes(watch, clock, 29) == {}
    assert passes(watch, clock, 3)[0] == pytest.approx(31, abs=2)
    assert passes(Watch(tmp_path, "off", clock), clock, 10**5) == {}


def test_a_launcher_that_was_suspended_itself_does_not_blame_the_ranks(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, 30.0, clock), Pulse(tmp_path, 0)
    pulse("train", 3, ())
    passes(watch, clock, 2)
    clock.now += 86400
    assert watch.look() == {}
    assert passes(watch, clock, 20) == {}


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path: Path, clock: Clock) -> None:
    watch, pulse = Watch(tmp_path, 5.0, clock), Pulse(tmp_path, 0)
    pulse("end", 3, ())
    passes(watch, clock, 2)
    pulse.end()
    assert passes(watch, clock, 60) == {}
