from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.runs import RunDir
from dtrain.verbs._requeue import decide, forget, refusal


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    return RunDir(tmp_path)


def ended(*ends: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"attempt": i, "ended": kind, "first_step": step} for i, (kind, step) in enumerate(ends)]


@pytest.mark.parametrize(("kind", "reason", "again"), [
    ("stopped", "the time limit is near", True), ("stopped", "the file STOP", True), ("stopped", "SIGUSR1", True),
    ("stopped", "SIGTERM", False), ("stopped", "SIGINT", False), ("done", "", False), ("user", "", False),
    ("nonfinite", "", False), ("interrupted", "", False), ("worker", "", True), ("launcher", "", True),
])  # fmt: skip
def test_what_is_queued_again(run: RunDir, kind: str, reason: str, again: bool) -> None:
    run.write_manifest({"attempts": ended((kind, 0))})
    decide(run, run.write_outcome(kind, 0, reason=reason), 1, lambda line: None)
    assert run.requeue.exists() is again
    if again:
        assert run.requeue.read_text() == "7.0\n"


def test_only_for_a_batch_script(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_BATCH")
    decide(run, run.write_outcome("stopped", 0, reason="SIGUSR1"), 1, lambda line: None)
    assert not run.requeue.exists()


def test_failures_only_where_that_is_asked_for(run: RunDir) -> None:
    decide(run, run.write_outcome("worker", 0), 0, lambda line: None)
    assert not run.requeue.exists()


def test_a_failure_that_comes_again_is_not_tried_for_ever() -> None:
    assert refusal(ended(("worker", 0)), 2) is None
    assert refusal(ended(("worker", 0), ("hang", 8)), 2) is None
    assert "no progress" in (refusal(ended(("worker", 8), ("worker", 8)), 5) or "")
    assert "failed 3 times in a row" in (refusal(ended(("worker", 0), ("worker", 8), ("worker", 9)), 2) or "")
    assert refusal(ended(("worker", 0), ("worker", 8), ("stopped", 9), ("worker", 12)), 2) is None


def test_what_was_asked_of_an_earlier_start_is_removed(run: RunDir) -> None:
    run.requeue.write_text("6.0\n")
    run.nodes.mkdir()
    run.joined.touch()
    forget(run)
    assert not run.joined.exists(), "else the ranks of a machine alone would stop for it"
    assert not run.requeue.exists()
    run.requeue.write_text("7.0\n")
    forget(run)
    assert run.requeue.exists()
