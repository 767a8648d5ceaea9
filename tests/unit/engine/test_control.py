"""When a rank is asked to save or to stop, by a clock that the test sets."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dtrain.engine.control import LOOK_S, SPARE_S, STOP_FILE, TIME_LIMIT, Control, why


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_nothing_asks(clock: _Clock) -> None:
    control = Control(clock=clock)
    clock.now += 1e6
    assert control.stop(step_s=1e3, save_s=1e3) == 0
    assert not control.save()


def test_the_first_signal_counts(clock: _Clock) -> None:
    control = Control(time_left_s=0, clock=clock)
    control.on_signal(signal.SIGUSR1, None)
    control.on_signal(signal.SIGTERM, None)
    assert control.stop(step_s=0, save_s=0) == signal.SIGUSR1
    assert control.stop(step_s=0, save_s=0) == signal.SIGUSR1  # it stays
    assert not control.save()  # the stop saves


def test_the_time_limit(clock: _Clock) -> None:
    """Two steps and two saves of 3 and 7 seconds are 20, and something to spare."""
    control = Control(time_left_s=100, clock=clock)
    clock.now += 100 - 20 - SPARE_S
    assert control.stop(step_s=3, save_s=7) == 0
    clock.now += 0.01
    assert control.stop(step_s=3, save_s=7) == TIME_LIMIT
    assert control.stop(step_s=0, save_s=0) == 0
    clock.now += 1000
    assert control.stop(step_s=0, save_s=0) == TIME_LIMIT


def test_every_so_many_minutes_since_the_last_save(clock: _Clock) -> None:
    control = Control(every_minutes=2, clock=clock)
    clock.now += 119
    assert not control.save()
    clock.now += 1
    assert control.save()
    assert not control.save()
    clock.now += 100
    control.saved()  # by steps
    clock.now += 119
    assert not control.save()
    clock.now += 1
    assert control.save()


def test_the_trigger_is_seen_within_a_second_and_removed(tmp_path: Path, clock: _Clock) -> None:
    trigger = tmp_path / "SAVE"
    control = Control(trigger=trigger, clock=clock)
    trigger.touch()
    clock.now += 0.9
    assert not control.save()  # a file system is not asked at every step
    clock.now += 0.2
    assert control.save()
    assert not trigger.exists()
    clock.now += 5
    assert not control.save()
    trigger.touch()
    clock.now += 1
    assert control.save()


def test_the_stop_trigger_is_seen_within_a_second_and_removed(tmp_path: Path, clock: _Clock) -> None:
    trigger = tmp_path / "STOP"
    control = Control(stop_trigger=trigger, clock=clock)
    trigger.write_text("7.0\n")
    assert control.stop(step_s=1, save_s=1) == 0
    clock.now += LOOK_S
    assert why(control.stop(step_s=1, save_s=1)) == "the file STOP"
    assert not trigger.exists()
    assert control.stop(step_s=1, save_s=1) == STOP_FILE
    assert not control.save()


def test_a_machine_that_has_come_stops_it_in_other_words(tmp_path: Path, clock: _Clock) -> None:
    trigger = tmp_path / "JOINED"
    control = Control(stop_trigger=tmp_path / "STOP", joined=trigger, clock=clock)
    trigger.touch()
    clock.now += LOOK_S
    assert why(control.stop(step_s=1, save_s=1)) == "another machine has come"
    assert not trigger.exists()


def test_a_save_by_trigger_starts_the_minutes_anew(tmp_path: Path, clock: _Clock) -> None:
    control = Control(trigger=tmp_path / "SAVE", every_minutes=1, clock=clock)
    clock.now += 50
    (tmp_path / "SAVE").touch()
    assert control.save()
    clock.now += 50
    assert not control.save()
    clock.now += 10
    assert control.save()


def test_a_trigger_where_no_folder_is(tmp_path: Path, clock: _Clock) -> None:
    control = Control(trigger=tmp_path / "gone" / "SAVE", clock=clock)
    clock.now += 2
    assert not control.save()


def test_why_in_words() -> None:
    assert why(TIME_LIMIT) == "the time limit is near"
    assert why(signal.SIGTERM) == "SIGTERM"
