from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from dtrain.launchers._torchrun import first_exits, is_closing
from dtrain.launchers.verdict import NodeEnd, explain, judge, judge_all
from dtrain.runs import RunDir, record_failure
from dtrain.runs.outcomes import JOINED, LEFT

# As torchrun 2.13 writes it, shortened.
KILLED = """\
W1121 api.py:1024] Sending process 100 closing signal SIGTERM
E1121 api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 101) of binary: python
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 100)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 101)  (SIGKILL)
"""
ECHO = "[pair.cc:534] Connection closed by peer [127.0.0.1]:42614"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "r")
    made.new_attempt()
    return made


def fail(run: RunDir, rank: int, error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:
        record_failure(run, 0, rank, caught, phase="train", step=3)


def test_torchrun_says_who_was_killed_and_whom_it_ended_itself(run: RunDir) -> None:
    log = run.launcher_log(0)
    assert not is_closing(log)
    log.write_text(KILLED)
    assert is_closing(log)
    assert [(end.rank, end.signal_name) for end in first_exits(log)] == [(1, "SIGKILL")]
    early = "\n".join(KILLED.splitlines()[:2])
    log.write_text(early)
    assert [(end.rank, end.code) for end in first_exits(log)] == [(1, -9)]
    log.write_text("Received 15 death signal, shutting down workers\n" + KILLED)
    assert not is_closing(log)


def test_a_kill_is_the_cause_of_the_echo(run: RunDir) -> None:
    run.launcher_log(0).write_text(KILLED)
    fail(run, 0, RuntimeError(ECHO))
    assert judge(run, 0, returncode=1).failure.type == "SIGKILL"


def test_ranks_that_the_launcher_killed_are_no_cause(run: RunDir) -> None:
    run.launcher_log(0).write_text(KILLED)
    fail(run, 0, ValueError("real"))
    assert judge(run, 0, returncode=1, ended={101}).failure.message == "real"


def test_a_full_disk_is_its_own_kind(run: RunDir) -> None:
    fail(run, 0, OSError(errno.ENOSPC, "No space left on device"))
    assert judge(run, 0, returncode=1).kind == "storage"


def test_what_rank_0_wrote_stands_unless_a_rank_failed(run: RunDir) -> None:
    run.write_outcome("done", 0, step=9)
    fail(run, 1, RuntimeError(ECHO))
    assert judge(run, 0, returncode=1).kind == "done"
    fail(run, 2, RuntimeError("export broke"))
    assert judge(run, 0, returncode=1).kind == "worker"
    assert run.read_outcome(0).state == "failed"


def test_an_outcome_of_an_earlier_attempt_is_not_this_ones(run: RunDir) -> None:
    run.write_outcome("done", 0, step=9)
    assert run.new_attempt() == 1
    assert judge(run, 1, returncode=0).kind == "launcher"


def test_stopped_before_it_began(run: RunDir) -> None:
    fail(run, 0, KeyboardInterrupt())
    outcome = judge(run, 0, returncode=1, told=signal.SIGINT)
    assert (outcome.kind, outcome.exit_code) == ("stopped", 75)


def test_a_failure_while_stopping_is_a_failure(run: RunDir) -> None:
    fail(run, 0, OSError(errno.ENOSPC, "No space left on device"))
    assert judge(run, 0, returncode=1, told=signal.SIGTERM).exit_code == 3


def test_a_long_traceback_is_cut_and_the_last_line_says_it_all(run: RunDir) -> None:
    def deep(level: int) -> None:
        if level:
            deep(level - 1)
        [][1]

    try:
        deep(60)
    except IndexError as error:
        error.add_note("\n".join(f"line {number}" for number in range(60)))
        record_failure(run, 0, 1, error, phase="save", step=3)
    text = explain(judge(run, 0, returncode=1), run).splitlines()
    assert len(text) < 40
    assert "lines left out" in text[1]
    assert "in save at step 3: IndexError: list index out of range; next: less " in text[-1]


def test_a_rank_killed_on_another_machine_is_the_cause(run: RunDir) -> None:
    log = run.launcher_log(0, 1)
    log.write_text("\n".join(KILLED.splitlines()[:2]))  # torchrun there had no time for more
    fail(run, 0, RuntimeError(ECHO))
    there = NodeEnd.from_dict(NodeEnd.of(log, 1, first_rank=4).as_dict())
    outcome = judge_all(run, 0, [NodeEnd("here", 1), there])
    assert (outcome.failure.type, outcome.failure.rank, outcome.failure.host) == ("SIGKILL", 5, there.host)


def test_a_stop_on_another_machine_is_one(run: RunDir) -> None:
    assert judge_all(run, 0, [NodeEnd("here", 1), NodeEnd("there", 1, told=2, forced=True)]).kind == "interrupted"
    outcome = judge_all(run, 0, [NodeEnd("here", 1), NodeEnd("there", 1, told=signal.SIGUSR1)])
    assert (outcome.kind, outcome.reason) == ("stopped", "SIGUSR1")


def test_a_machine_that_is_gone_is_named_unless_a_rank_says_more(run: RunDir) -> None:
    gone = "node 1 on n2 has not been heard of"
    fail(run, 0, RuntimeError(ECHO))
    outcome = judge_all(run, 0, [NodeEnd("here", -9)], trouble=gone)
    assert (outcome.kind, outcome.message) == ("launcher", gone)
    fail(run, 1, ValueError("real"))
    assert judge_all(run, 0, [NodeEnd("here", -9)], trouble=gone).failure.message == "real"


def test_a_machine_that_is_gone_is_the_cause_of_the_echo(run: RunDir) -> None:
    fail(run, 0, RuntimeError(ECHO))
    outcome = judge_all(run, 0, [NodeEnd("here", 1)], lost="node 1 on n2 is gone")
    assert (outcome.kind, outcome.message) == ("lost", "node 1 on n2 is gone")


@pytest.mark.parametrize(
    ("reason", "told", "expected"),
    [
        ("SIGTERM", None, LEFT),
        ("SIGTERM", signal.SIGTERM, "SIGTERM"),
        (JOINED, None, JOINED),
        (JOINED, signal.SIGTERM, "SIGTERM"),
    ],
)
def test_a_stop_that_nobody_asked_for_is_told_from_one(
    run: RunDir, reason: str, told: int | None, expected: str
) -> None:
    """A launcher that is killed takes its ranks with it by SIGTERM, for which all of them save. And one that is asked for
    during a save for another machine is not forgotten for that.
    """
    run.write_outcome("stopped", 0, step=5, message="m", reason=reason)
    outcome = judge_all(run, 0, [NodeEnd("here", 0, told)], lost="node 1 on n2 is gone")
    assert (outcome.kind, outcome.step, outcome.reason) == ("stopped", 5, expected)
