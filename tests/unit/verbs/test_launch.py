"""What `dtrain launch` does before the ranks start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain import cli
from dtrain.errors import RunError
from dtrain.launchers import supervise
from dtrain.plan import propose as planning
from dtrain.runs import Outcome, RunDir, lock
from dtrain.runs.failures import Failure
from dtrain.verbs import _told, launch
from tests.e2e.command import SMALL, write_texts

TYPED = ["launch", *SMALL, "dataset.path=texts.jsonl", "strategy=ddp", "launcher.procs=1", "run.name=first"]
TOLD = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Signals that whoever started the tests ignores, as nohup does."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in TOLD}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl")
    return RunDir(tmp_path / "runs" / "first")


def test_other_machines_see_that_it_lives_while_it_reads_weights(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take longer than the silence after which another one takes the folder over."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    beats = 0

    def read(*what: Any) -> str:
        nonlocal beats
        held, deadline = run.path / lock.NAME, time.monotonic() + 60
        os.utime(held, (1, 1))
        while time.monotonic() < deadline and held.stat().st_mtime == 1:
            time.sleep(0.01)
        beats += held.stat().st_mtime != 1
        raise RunError("far enough")

    monkeypatch.setattr(launch, "_base", read)
    assert cli.run(TYPED) == 2
    assert beats == 1


def ends_by(make: Callable[[], None], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The command, to which that is done at a place where no rank runs; it ends with 75."""

    def busy(*what: Any) -> str:
        make()
        time.sleep(60)
        raise AssertionError("it went on")

    before = [signal.getsignal(signum) for signum in TOLD]
    monkeypatch.setattr(launch, where, busy)
    with pytest.raises(SystemExit) as ended:
        cli.run(TYPED)
    assert ended.value.code == 75
    assert [signal.getsignal(signum) for signum in TOLD] == before


@pytest.mark.parametrize("where", ["prepare_all", "_base"])
@pytest.mark.parametrize("signum", TOLD)
def test_a_signal_ends_it_in_order(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signum: signal.Signals, where: str
) -> None:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    run.path.mkdir(parents=True)  # a batch script lies there
    ends_by(lambda: os.kill(os.getpid(), signum), monkeypatch, where)
    said = capfd.readouterr().err
    assert f"{signum.name}: ended while no rank ran; the same command goes on" in said
    assert run.requeue.exists() == ("asked to queue the job again" in said) == (signum == signal.SIGUSR1)
    assert run.holder() is None


@pytest.mark.parametrize("batch", ["7.0", None])
def test_the_file_stop_ends_it_before_ranks_are_there_to_look_for_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], batch: str | None
) -> None:
    monkeypatch.setattr(_told, "LOOK_S", 0.02)
    run.path.mkdir(parents=True)
    run.stop_trigger.write_text("6.0")  # meant an earlier start
    if batch is not None:
        monkeypatch.setenv("DTRAIN_BATCH", batch)

    def make() -> None:
        time.sleep(0.2)
        run.stop_trigger.write_text("7.0\n")

    ends_by(make, monkeypatch, "prepare_all")
    said = capfd.readouterr().err
    assert said.startswith("the file STOP: ended while no rank ran")
    assert run.requeue.exists() == ("asked to queue the job again" in said) == (batch is not None)
    assert not run.stop_trigger.exists()


def test_a_batch_script_may_be_told_before_dtrain_has_started(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    run.path.mkdir(parents=True)
    run.stop_trigger.write_text("7.0\n")
    monkeypatch.setattr(launch, "prepare_all", lambda proposal: pytest.fail("it went on"))
    with pytest.raises(SystemExit):
        cli.run(TYPED)
    assert run.requeue.read_text() == "7.0\n"


def test_one_that_plans_ends_once_it_knows_what_it_is(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else nothing could ask for the job to be queued again."""
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    run.path.mkdir(parents=True)
    propose = planning.propose

    def told(*what: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return propose(*what)

    monkeypatch.setattr(planning, "propose", told)
    with pytest.raises(SystemExit) as ended:
        cli.run(TYPED)
    assert ended.value.code == 75
    first, second = capfd.readouterr().err.splitlines()
    assert first == "SIGUSR1: it ends as soon as it has planned; again: at once"
    assert second.endswith("the batch script is asked to queue the job again")
    assert run.requeue.read_text() == "7.0\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_once_the_ranks_have_ended_changes_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """A job whose run is done was queued again for it, and a pod made again, only to be refused."""
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")

    def ended(command: Any, run: RunDir, attempt: int, **how: Any) -> Outcome:
        os.kill(os.getpid(), signum)
        return run.write_outcome("done", attempt)

    monkeypatch.setattr(supervise, "supervise", ended)
    assert cli.run(TYPED) == 0
    assert not run.requeue.exists()
    assert run.read_manifest()["attempts"][0]["ended"] == "done"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_while_modules_are_read_waits(run: RunDir, signum: signal.Signals) -> None:
    """As soon as Python runs the first line of dtrain; it ended by the system's default, without a word."""
    code = (
        "import os, sys, dtrain.__main__ as m\n"
        "class Finder:\n"
        "    def find_spec(self, name, *more):\n"
        f"        if name == 'dtrain.cli': os.kill(os.getpid(), {int(signum)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['dtrain', *{TYPED}]\n"
        "m.main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 75, ran.stderr
    assert f"{signum.name}: it ends as soon as it has planned" in ran.stderr


def test_what_a_rank_finds_wrong_in_the_input_is_told_as_any_such(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "tuning.targets=q: matches no layer\n  near it: q_proj\ntuning.modules_to_save=x: no such module"
    failure = Failure(rank=0, host="h", local_rank=0, phase="load", step=0, kind="user", type="ModelError", message=said,
                      traceback="Traceback ...", time_ns=0, log="logs/rank-0.log")  # fmt: skip
    outcome: Any = Outcome(kind="user", attempt=0, failure=failure)
    settled: Any = None  # only of a run that stopped
    assert launch.tell(outcome, run, settled) == 2
    assert capsys.readouterr().err.splitlines() == [
        "2 problems:", "error: tuning.targets=q: matches no layer", "  near it: q_proj",
        "error: tuning.modules_to_save=x: no such module",
    ]  # fmt: skip
