from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dtrain.config.spec import Gathering, Restarts
from dtrain.runs import Outcome, RunDir
from dtrain.runs.outcomes import JOINED, LEFT
from dtrain.verbs._restart import MOST_S, after_failure, wait_s, with_others
from dtrain.verbs._told import Wish, heeded


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.delenv("DTRAIN_BATCH", raising=False)
    return RunDir(tmp_path)


def after(
    run: RunDir, *ends: tuple[str, int], most: int = 3, wait: float = 0.0, wish: Wish | None = None
) -> tuple[bool, str]:
    """Whether it is started again after attempts that ended so, each with its first step; and what is said."""
    run.write_manifest({"attempts": []})
    for attempt, (kind, step) in enumerate(ends):
        run.add_attempt(attempt, ended=kind, first_step=step)
    said: list[str] = []
    outcome = run.write_outcome(ends[-1][0], len(ends) - 1)
    return after_failure(run, outcome, Restarts(most, wait), wish or quiet(run), said.append), "\n".join(said)


def quiet(run: RunDir) -> Wish:
    """Nobody wishes anything."""
    wish = Wish()
    wish.known(run, 75)
    return wish


def test_machines_that_leave_do_not_count_where_others_may_go_on(run: RunDir) -> None:
    for attempt, kind in enumerate(["worker", "lost", "lost", "worker"]):
        run.add_attempt(attempt, ended=kind, first_step=attempt)
    outcome = run.write_outcome("worker", 3)
    assert after_failure(run, outcome, Restarts(2, 0, counts_lost=False), quiet(run), lambda line: None)
    assert not after_failure(run, outcome, Restarts(2, 0), quiet(run), lambda line: None)


@pytest.mark.parametrize(("kind", "reason", "expected"), [
    ("lost", "", True), ("stopped", JOINED, True), ("stopped", LEFT, True), ("stopped", "SIGTERM", False), ("worker", "", False),
    ("done", "", False),
])  # fmt: skip
def test_all_meet_anew_for_a_machine_that_leaves_or_comes(run: RunDir, kind: str, reason: str, expected: bool) -> None:
    run.write_manifest({"attempts": []})
    outcome = Outcome(kind=kind, attempt=0, reason=reason)
    assert with_others(run, outcome, Gathering(least=1), lambda line: None) is expected
    assert not with_others(run, outcome, Gathering(), lambda line: None)


@pytest.mark.parametrize(("first_steps", "expected"), [([4] * 4, True), ([4] * 5, False), ([0, 4, 4, 4, 4], True)])
def test_machines_do_not_leave_for_ever_at_one_step(run: RunDir, first_steps: list[int], expected: bool) -> None:
    run.write_manifest({"attempts": []})
    for attempt, step in enumerate(first_steps):
        run.add_attempt(attempt, ended="lost", first_step=step)
    outcome, said = run.write_outcome("lost", len(first_steps) - 1), []
    assert with_others(run, outcome, Gathering(least=1), said.append) is expected
    assert ("began at step 4" in said[-1]) is not expected
    assert not after_failure(run, outcome, Restarts(3, 0, counts_lost=False), quiet(run), said.append)


@pytest.mark.parametrize(("kind", "expected"), [
    ("lost", True), ("worker", True), ("hang", True), ("storage", True), ("launcher", True), ("user", False), ("nonfinite", False), ("oom", False),
    ("stopped", False), ("done", False), ("interrupted", False),
])  # fmt: skip
def test_what_is_started_again(run: RunDir, kind: str, expected: bool) -> None:
    assert after(run, (kind, 0))[0] is expected


def test_so_often_in_a_row_and_no_more(run: RunDir) -> None:
    assert after(run, ("worker", 0), ("worker", 4), most=2)[0]
    went_on, said = after(run, ("worker", 0), ("worker", 4), ("hang", 8), most=2)
    assert not went_on
    assert said == "not started again: it has failed 3 times in a row, and launcher.max_restarts=2"
    assert after(run, ("worker", 0), ("worker", 4), ("stopped", 8), ("worker", 9), most=1)[0]
    assert not after(run, ("worker", 0), most=0)[0]


def test_not_without_progress(run: RunDir) -> None:
    went_on, said = after(run, ("worker", 4), ("worker", 4))
    assert not went_on
    assert "began at step 4 and failed: no progress" in said


def test_a_batch_script_starts_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    assert not after(run, ("worker", 0))[0]


def test_waits_grow() -> None:
    assert [wait_s(10, failed) for failed in (1, 2, 3, 9)] == [10, 20, 40, MOST_S]


def test_it_waits_and_a_signal_ends_that(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    """With what has a pod made again: the failure is not the end of the run."""
    began = time.monotonic()
    assert after(run, ("worker", 0), wait=0.3)[0]
    assert time.monotonic() - began >= 0.3
    before = signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        while signal.getsignal(signal.SIGTERM) is before:  # which would end the tests
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    telling = threading.Thread(target=tell)
    with pytest.raises(SystemExit) as ended, heeded() as wish:  # noqa: PT012
        wish.known(run, 143)
        telling.start()
        after(run, ("worker", 0), wait=600, wish=wish)
    telling.join()
    assert ended.value.code == 143
    assert "SIGTERM: ended while no rank ran" in capfd.readouterr().err
    assert time.monotonic() - began < 100
    assert signal.getsignal(signal.SIGTERM) is before
