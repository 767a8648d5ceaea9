"""What the time went into, of a run of two attempts that is written down by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from dtrain.runs.account import account, lost_after, seconds_of


def at(second: int) -> str:
    return f"2026-11-22T00:{second // 60:02d}:{second % 60:02d}.500Z"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Ten steps of 2 s, of which 0.5 s are waiting for rows: the first attempt does six and is killed after the save of
    step 4, which the second goes on from.
    """
    made = RunDir(tmp_path)
    made.write_manifest({"steps": 10})
    events = [
        {"kind": "launched", "attempt": 0, "step": 0, "time": at(0)},
        {"kind": "training", "attempt": 0, "step": 0, "time": at(10)},
        {"kind": "saved", "attempt": 0, "step": 4, "pause_s": 1.0, "time": at(19)},
        {"kind": "ended", "attempt": 0, "time": at(24)},
        {"kind": "launched", "attempt": 1, "step": 4, "time": at(60)},
        {"kind": "training", "attempt": 1, "step": 4, "time": at(75)},
    ]
    write(made.events, events)
    write(made.metrics, [{"step": step, "step_s": 2.0, "data_s": 0.5} for step in range(1, 9)])
    write(made.path / "eval.jsonl", [{"step": 5, "eval_s": 3.0}])
    return made


def write(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')


def test_where_the_time_went(run: RunDir) -> None:
    now = seconds_of(at(87))
    told = account(run, running=True, now=now)
    # First attempt: 24 s, of which 10 to start, 8 for steps 1 to 4 (2 of them data), 1 to save; 5 are lost. Second: 27 s, of
    # which 15 to start, 8 for steps 5 to 8, 3 to evaluate; 1 is left.
    assert told.wall_s == pytest.approx(24 + 27)
    assert told.spent == pytest.approx(
        {"steps": 12, "data": 4, "eval": 3, "save": 1, "start-up": 25, "lost": 5, "other": 1}
    )
    assert told.goodput == pytest.approx(12 / 51)
    assert told.left_s == pytest.approx(12 / 4 * 2)  # four steps in 12 s, two are left


def test_one_that_ended_has_nothing_left(run: RunDir) -> None:
    with run.events.open("a") as file:
        file.write("\n" + json.dumps({"kind": "ended", "attempt": 1, "time": at(87)}) + "\n")
    told = account(run, running=False)
    assert told.left_s is None
    assert told.wall_s == pytest.approx(51)


def test_one_that_never_trained(run: RunDir, tmp_path: Path) -> None:
    run.metrics.unlink()
    assert account(run, running=False) is None
    assert account(RunDir(tmp_path / "none"), running=False) is None


def test_what_was_lost_with_all_processes_is_counted(run: RunDir) -> None:
    """The first attempt is killed with its launcher: what it did after its last event, the second has found."""
    lines = [line for line in run.events.read_text().splitlines() if '"ended"' not in line]
    events = [json.loads(line) for line in lines if line.endswith("}")]
    write(run.events, [{**event, "lost_s": 4.0} if event["attempt"] == 1 else event for event in events])
    told = account(run, running=True, now=seconds_of(at(87)))
    assert told.wall_s == pytest.approx(19 + 4 + 27)
    assert told.spent["lost"] == pytest.approx(4)


def test_what_is_done_again(run: RunDir) -> None:
    assert lost_after(run, 5) == (3, 6.0)
    assert lost_after(run, 8) == (0, 0.0)


def test_lines_that_say_no_step_are_passed_over(run: RunDir) -> None:
    before = account(run, running=False)
    for path in (run.metrics, run.path / "eval.jsonl"):
        whole = path.read_text().removesuffix('{"torn')
        path.write_text('{}\n{"step": null}\n{"step": "6"}\n' + whole)
    assert lost_after(run, 5) == (3, 6.0)
    assert account(run, running=False) == before
