from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from pathlib import Path

import pytest

from dtrain.trackers._words import count, duration, size
from dtrain.trackers.console import Console
from tests.unit.trackers.reports import eval_report, samples_report, step_report


def lines(steps: int, first_step: int = 0, **values: object) -> list[str]:
    stream = io.StringIO()
    tracker = Console(**values).build(Path("/r"), {}, stream)
    tracker.start(steps=steps, first_step=first_step, lines=["model tiny"])
    for step in range(first_step + 1, steps + 1):
        tracker.step(step_report(step))
    tracker.finish(outcome="done")
    return stream.getvalue().splitlines()


def test_a_short_run_shows_each_step() -> None:
    shown = lines(4)
    assert shown[0] == "model tiny"
    assert [line.split("  ")[0] for line in shown[1:-1]] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert "loss 2.5000  grad 1.25  lr 3.00e-04  51.2k tok/s  3.0 GiB" in shown[1]
    assert shown[-1].startswith("done at step 4, loss 2.5000, after ")


@pytest.mark.parametrize(("steps", "first_step"), [(200, 0), (10_000, 0), (10_000, 9_900), (5, 5)])
def test_auto_keeps_to_some_twenty_lines_with_the_first_and_the_last(steps: int, first_step: int) -> None:
    shown = [line for line in lines(steps, first_step) if line.startswith("step")]
    assert len(shown) <= 25
    if steps > first_step:
        assert f"{first_step + 1}/{steps} " in shown[0]
        assert f"{steps}/{steps} " in shown[-1]


def test_every_steps_is_kept() -> None:
    assert len([line for line in lines(100, every_steps=10) if line.startswith("step")]) == 11  # and the first


def test_evaluations_and_notes_are_lines() -> None:
    stream = io.StringIO()
    tracker = Console().build(Path("/r"), {}, stream)
    tracker.start(steps=10, first_step=0, lines=[])
    tracker.eval(eval_report(5, extras={"perplexity": 9.5}))
    tracker.note("the last batch is short")
    assert stream.getvalue() == "eval at step 5  loss 2.2500  perplexity 9.5  (1s)\nthe last batch is short\n"


def test_samples_are_a_line_each_and_move_no_cursor() -> None:
    stream = io.StringIO()
    Console().build(Path("/r"), {}, stream).samples(samples_report(5))
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("samples at step 5  (")
    assert second == r'  "a\n" -> "b\u001b[2J"'
    assert third == f'  "...{"c" * 57}" -> "d"'


def test_mfu_only_where_it_is_known() -> None:
    stream = io.StringIO()
    tracker = Console().build(Path("/r"), {}, stream)
    tracker.start(steps=2, first_step=0, lines=[])
    tracker.step(step_report(1))
    tracker.step(step_report(2, mfu=0.4123))
    assert "mfu" not in stream.getvalue().splitlines()[0]
    assert "mfu 41.2%" in stream.getvalue().splitlines()[1]


def on_terminal(columns: int) -> str:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    read: list[bytes] = []

    def drain() -> None:
        try:
            while data := os.read(parent, 65536):
                read.append(data)
        except OSError:
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(child, "w", buffering=1) as stream:
        tracker = Console().build(Path("/r"), {}, stream)
        tracker.start(steps=20, first_step=10, lines=["model tiny"])
        for step in range(11, 21):
            tracker.step(step_report(step))
        tracker.note("a note")
        tracker.finish(outcome="stopped")
    reader.join()
    os.close(parent)
    return b"".join(read).decode()


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_gets_a_bar_that_fits_and_its_cursor_back(columns: int) -> None:
    shown = on_terminal(columns)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= columns
    assert "step 20/20" in plain
    assert "a note" in plain
    assert "stopped at step 20" in plain


def test_words() -> None:
    assert [count(value) for value in (7, 999, 51234, 1234567, 3e9)] == ["7", "999", "51.2k", "1.23M", "3.00B"]
    assert [duration(value) for value in (3, 62, 3725, 90000)] == ["3s", "1m02s", "1h02m", "1d01h"]
    assert [size(value) for value in (2**20 * 5, 3 * 2**30)] == ["5 MiB", "3.0 GiB"]
