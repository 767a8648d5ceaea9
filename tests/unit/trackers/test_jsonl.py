from __future__ import annotations

import io
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dtrain.runs.files import read_lines
from dtrain.trackers._plot import limits, smooth
from dtrain.trackers.base import AbstractTracker, Sample, SamplesReport
from dtrain.trackers.jsonl import Jsonl
from tests.unit.trackers.reports import eval_report, samples_report, step_report

KEYS = ["step", "loss", "grad_norm", "lr", "num_targets", "tokens", "tokens_per_s", "step_s", "data_s", "mfu",
        "mem_bytes", "epoch", "samples"]  # fmt: skip


def started(run_dir: Path, *, first_step: int = 0, plot: bool = False) -> AbstractTracker:
    tracker = Jsonl(plot=plot).build(run_dir, {}, io.StringIO())
    tracker.start(steps=100, first_step=first_step, lines=[])
    return tracker


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_one_object_a_step_with_exactly_these_keys(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.step(step_report(1))
    tracker.step(step_report(2, extras={"aux_loss": 0.5, "loss": 9.0}))
    tracker.eval(eval_report(2, extras={"accuracy": 0.5}))
    first, second = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )  # before the end
    assert list(first) == KEYS
    assert (list(second), second["loss"]) == ([*KEYS, "aux_loss"], 2.5)
    evaluated = json.loads((tmp_path / "eval.jsonl").read_text())
    assert evaluated == {"step": 2, "loss": 2.25, "num_targets": 90, "eval_s": 1.0, "accuracy": 0.5}
    tracker.finish(outcome="done")


def test_samples_have_a_file_of_their_own(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    assert not (tmp_path / "samples.jsonl").exists()
    for step in (1, 2):
        tracker.samples(samples_report(step))
    tracker.finish(outcome="stopped")
    started(tmp_path, first_step=1).finish(outcome="done")  # step 2 is done again
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "prompt": "a\n", "text": "b\x1b[2J", "finish": "stop", "num_tokens": 1}
    assert [(row["step"], row["num_tokens"]) for row in rows] == [(1, 1), (1, 9)]


def test_what_a_model_wrote_ends_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    tracker = started(tmp_path)
    tracker.samples(SamplesReport(1, [Sample("p", text, "stop", 1)], 0.5))
    tracker.finish(outcome="stopped")
    started(tmp_path, first_step=1).finish(outcome="done")
    assert [one["text"] for one in read_lines(tmp_path / "samples.jsonl")] == [text]


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.step(step_report(1, loss=float("nan"), grad_norm=float("inf"), extras={"x": float("-inf")}))
    tracker.finish(outcome="failed")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"], row["x"]) == (None, None, None)


@pytest.mark.parametrize(("first_step", "kept"), [(3, [1, 2, 3, 4]), (0, [1]), (5, [1, 2, 3, 4, 5, 6])])
def test_steps_that_are_done_again_stand_once(tmp_path: Path, first_step: int, kept: list[int]) -> None:
    tracker = started(tmp_path)
    for step in range(1, 6):
        tracker.step(step_report(step))
        tracker.eval(eval_report(step))
    tracker.finish(outcome="failed")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    tracker = started(tmp_path, first_step=first_step)
    tracker.step(step_report(first_step + 1))
    tracker.finish(outcome="done")
    assert steps(tmp_path / "metrics.jsonl") == kept
    assert steps(tmp_path / "eval.jsonl") == [step for step in range(1, 6) if step <= first_step]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "metrics.jsonl"]


def test_the_picture(tmp_path: Path) -> None:
    tracker = started(tmp_path, plot=True)
    for step in range(1, 31):
        tracker.step(step_report(step, loss=float("nan") if step == 7 else 3 - step / 20))
    tracker.eval(eval_report(30))
    tracker.finish(outcome="done")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_no_picture_of_one_point(tmp_path: Path) -> None:
    tracker = started(tmp_path, plot=True)
    tracker.step(step_report(1))
    tracker.finish(outcome="done")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_is_a_mean_without_a_bias_at_its_begin() -> None:
    assert smooth([(1, 4.0), (2, 4.0), (3, 4.0)]) == [(1, 4.0), (2, 4.0), (3, 4.0)]
    # keep = 1/2: (4*1/4 + 1*1/2) / (3/4) = 2
    assert smooth([(1, 4.0), (2, 1.0)]) == [(1, 4.0), (2, 2.0)]


def test_one_spike_does_not_flatten_the_curve() -> None:
    low, high = limits([*[2.0 + step / 1000 for step in range(999)], 500.0])
    assert low < 2.0
    assert 3.0 < high < 3.2


@contextmanager
def full(path: Path, room: int) -> Iterator[None]:
    """A limit on the size of files is what the kernel has for a full disk: of the last line it takes a part."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_on_a_full_disk_lines_wait(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.step(step_report(1))
    with full(tmp_path / "metrics.jsonl", room=20):
        for step in (2, 3):
            tracker.step(step_report(step))
        assert steps(tmp_path / "metrics.jsonl") == [1]
        (warning,) = tracker.warnings()
        assert "its lines wait until there is room" in warning
    tracker.step(step_report(4))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert tracker.warnings() == [
        f"jsonl: {tmp_path / 'metrics.jsonl'}: there is room again; 2 lines were written late"
    ]
    tracker.finish(outcome="done")


def test_what_waits_is_written_at_the_end_where_there_is_room_by_then(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.step(step_report(1))
    with full(tmp_path / "metrics.jsonl", room=0):
        tracker.step(step_report(2))
    tracker.warnings()
    tracker.finish(outcome="done")
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert tracker.warnings() == []


def test_what_there_is_never_room_for_is_told_as_lost(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.step(step_report(1))
    with full(tmp_path / "metrics.jsonl", room=0):
        tracker.step(step_report(2))
        tracker.warnings()
        with suppress(OSError):
            tracker.finish(outcome="done")
    assert "the last 1 lines are lost" in tracker.warnings()[0]
