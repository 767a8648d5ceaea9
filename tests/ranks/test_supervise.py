"""The launcher with real torchrun and real ranks: it ends within seconds, says why, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.config.spec import Command
from dtrain.launchers._processes import marked
from dtrain.launchers.local import Local
from dtrain.launchers.supervise import SAME_PRESS_S, STOPPING_S, _places_of, end_left, supervise
from dtrain.launchers.verdict import explain
from dtrain.plan.world import Topology
from dtrain.runs import Outcome, RunDir
from tests import measured

RANK = str(Path(__file__).with_name("_supervised.py"))


def command(run: RunDir, what: str, size: int) -> Command:
    made = Local().command(run.path, ["HERE"], Topology(nodes=1, procs_per_node=size))
    argv = list(made.argv)
    assert argv[-3:] == ["-m", "dtrain", "HERE"]
    return Command([*argv[:-3], RANK, what], made.env)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / 'a run\'s "folder" é')
    made.path.mkdir()
    return made


noted: list[str] = []
"""What the launcher has said."""


def supervised(run: RunDir, what: str, *, size: int = 2, then: Callable[[list[int]], None] | None = None) -> Outcome:
    """Run it to its end; `then` acts on the pids of the ranks once all are ready."""

    def act() -> None:
        ready = [run.path / f"ready-{rank}" for rank in range(size)]
        while not all(path.exists() and path.read_text() for path in ready):
            time.sleep(0.02)
        acted_at.append(time.monotonic())
        then([int(path.read_text()) for path in ready])

    acted_at: list[float] = []
    noted.clear()
    if then is not None:
        threading.Thread(target=act, daemon=True).start()
    outcome = supervise(command(run, what, size), run, run.new_attempt(), note=noted.append)
    assert marked(run.path) == []
    if acted_at:
        took_s = time.monotonic() - acted_at[0]
        assert took_s < STOPPING_S  # what ranks get that were told to stop, and no others
        measured.detected(took_s)
    return outcome


def me(*signals: int) -> Callable[[list[int]], None]:
    def send(pids: list[int]) -> None:
        for signum in signals:
            os.kill(os.getpid(), signum)
            while not noted:  # it is heard: from then on another one is a second
                time.sleep(0.02)
            time.sleep(1.5 * SAME_PRESS_S)

    return send


def _agent(pids: list[int]) -> int:
    """torchrun's process."""
    return int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])


def test_done(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = supervised(run, "done")
    assert (outcome.kind, outcome.exit_code, outcome.step) == ("done", 0, 4)
    assert capfd.readouterr().out == "the user sees this\n"
    assert [run.log(0, rank).read_text() for rank in (0, 1)] == [f"rank {rank} is in its log\n" for rank in (0, 1)]


def test_the_first_failing_rank_is_shown(run: RunDir) -> None:
    began = time.monotonic()
    outcome = supervised(run, "raise")
    assert time.monotonic() - began < 100  # rank 0 sleeps for 1000 s
    assert (outcome.kind, outcome.exit_code, outcome.failure.rank, outcome.failure.step) == ("worker", 3, 1, 3)
    text = explain(outcome, run)
    assert text.count("Traceback") == 1
    last = text.splitlines()[-1]
    assert last.startswith("rank 1 on ")
    assert "ValueError: row 7 is a banana" in last
    assert "rank-1.log" in last


def test_a_user_error_is_one_message_and_exit_2(run: RunDir) -> None:
    outcome = supervised(run, "user")
    assert outcome.exit_code == 2
    assert explain(outcome, run) == "dataset.path: /nowhere is empty; name a file with rows"


def test_one_process_needs_no_torchrun_and_fails_alike(run: RunDir) -> None:
    outcome = supervised(run, "user", size=1)
    assert (outcome.exit_code, outcome.failure.rank) == (2, 0)
    assert "torch.distributed.run" not in command(run, "done", 1).argv


def test_a_killed_rank_is_named_with_its_signal(run: RunDir) -> None:
    outcome = supervised(run, "gloo", then=lambda pids: os.kill(pids[1], signal.SIGKILL))
    assert (outcome.kind, outcome.exit_code) == ("worker", 3)
    assert (outcome.failure.rank, outcome.failure.type) == (1, "SIGKILL")
    assert "out of memory" in explain(outcome, run)


def test_the_only_process_killed(run: RunDir) -> None:
    outcome = supervised(run, "wait", size=1, then=lambda pids: os.kill(pids[0], signal.SIGKILL))
    assert (outcome.exit_code, outcome.failure.rank, outcome.failure.type) == (3, 0, "SIGKILL")


def test_a_killed_torchrun_takes_its_ranks_with_it(run: RunDir) -> None:
    outcome = supervised(run, "deaf", then=lambda pids: os.kill(_agent(pids), signal.SIGKILL))
    assert (outcome.kind, outcome.exit_code) == ("launcher", 3)
    assert "SIGKILL" in outcome.message


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_one_signal_stops_with_a_save(run: RunDir, signum: int) -> None:
    outcome = supervised(run, "wait", then=me(signum))
    assert (outcome.kind, outcome.exit_code, outcome.step) == ("stopped", 75, 4)


def test_a_signal_to_every_process_saves_too(run: RunDir) -> None:
    """As Slurm sends it to a step."""

    def tell_all(pids: list[int]) -> None:
        for pid in (_agent(pids), *pids, os.getpid()):
            os.kill(pid, signal.SIGUSR1)

    outcome = supervised(run, "wait", then=tell_all)
    assert (outcome.kind, outcome.exit_code, outcome.step) == ("stopped", 75, 4)


def test_a_second_signal_ends_it_at_once(run: RunDir) -> None:
    outcome = supervised(run, "deaf", then=me(signal.SIGINT, signal.SIGINT))
    assert (outcome.kind, outcome.exit_code) == ("interrupted", 3)


def test_a_stopped_rank_does_not_hold_up_the_end(run: RunDir) -> None:
    def freeze_and_fail(pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)

    outcome = supervised(run, "wait", then=freeze_and_fail)
    assert (outcome.failure.rank, outcome.failure.type) == (1, "SIGKILL")


def test_no_outcome_is_no_success(run: RunDir) -> None:
    outcome = supervised(run, "silent", size=1)
    assert (outcome.kind, outcome.exit_code) == ("launcher", 3)
    assert "without saying how" in explain(outcome, run)


def test_what_cannot_start_shows_the_launchers_log(run: RunDir) -> None:
    bad = Command([sys.executable, "-m", "no_such_module"], {})
    outcome = supervise(bad, run, run.new_attempt())
    assert outcome.exit_code == 3
    assert "No module named no_such_module" in explain(outcome, run)


def test_a_killed_launcher_leaves_no_orphans(run: RunDir) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_supervise as t; from dtrain.runs import RunDir;"
        "run = RunDir(sys.argv[2]); t.supervise(t.command(run, 'wait', 2), run, run.new_attempt())"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(Path(RANK).parent), str(run.path)])
    while not all((run.path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert driver.poll() is None
        time.sleep(0.05)
    assert len(marked(run.path)) >= 3
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 60
    while marked(run.path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(run.path) == []
    folder = Path(tempfile.gettempdir())
    assert len(list(folder.glob(f"{_places_of(run)}*"))) == 1
    end_left(run)  # as the next start does
    assert list(folder.glob(f"{_places_of(run)}*")) == []
