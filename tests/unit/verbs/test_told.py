"""Signals that come while no rank runs, at any place: what is whole stays whole, and none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.spec import Command, Gathering
from dtrain.launchers import muster, supervise
from dtrain.launchers.muster import Follower, Leader, Over, enter
from dtrain.runs import RunDir
from dtrain.verbs import _told, node
from dtrain.verbs._told import Wish, heeded


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    made = RunDir(tmp_path / "r")
    made.path.mkdir()
    return made


@pytest.fixture
def wish(run: RunDir) -> Iterator[Wish]:
    with heeded() as made:
        made.known(run, 75)
        yield made


def tell(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_that_comes_while_something_is_begun_waits_for_its_end(wish: Wish, run: RunDir, signum: int) -> None:
    tell(signum)
    assert not run.requeue.exists()
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit), wish.heeding():
        pytest.fail("it went on")
    assert run.requeue.exists() == (signum == signal.SIGUSR1)


def test_of_two_at_once_one_counts_and_a_further_one_ends_it_anywhere(wish: Wish) -> None:
    tell()
    tell()
    tell(signal.SIGUSR1)  # a scheduler may say so several times
    wish._came_at -= 1  # a second later
    tell(signal.SIGUSR1)
    with pytest.raises(SystemExit):
        tell()


def test_one_whose_exception_is_dropped_is_heard_again(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops what is raised in a finalizer, in a callback of an import's lock, and in others of C."""
    monkeypatch.setattr(_told, "LOOK_S", 0.05)
    monkeypatch.setattr(_told, "AGAIN_S", 0.1)
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Finalized:
        def __del__(self) -> None:
            tell(signal.SIGUSR1)

    def busy() -> None:
        Finalized()
        assert dropped
        time.sleep(60)
        pytest.fail("it went on")

    with pytest.raises(SystemExit), wish.watching():
        busy()


def test_one_that_comes_before_the_ranks_start_is_no_ranks(wish: Wish, run: RunDir) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tell()
    with pytest.raises(SystemExit):
        supervise.supervise(Command([sys.executable, "-c", "1"], {"RANK": "0"}), run, run.new_attempt(), heed=wish.heed)
    assert not run.launcher_log(0).exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_new_file_stop_is_not_taken_for_one_of_an_earlier_start(run: RunDir) -> None:
    """One that comes after the last look, and before what earlier starts have left is removed."""
    run.stop_trigger.write_text("6.0\n")
    wish = Wish()
    wish.known(run, 75)
    wish.forget()
    assert list(run.path.iterdir()) == []
    wish.forget()
    run.stop_trigger.write_text("")
    with pytest.raises(SystemExit):
        wish.forget()
    assert list(run.path.iterdir()) == [run.requeue]


def test_others_are_told_however_often_the_leader_is(wish: Wish, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` and others signal a process and then its group: the second one came into the last word."""
    followers: list[Follower] = []
    say = muster._tell

    def say_and_be_told(path: Path, what: dict[str, Any]) -> None:
        tell()
        say(path, what)

    def lead() -> None:
        with enter(run, Gathering(timeout_s=100), 4, "d", lambda line: None) as leader:
            assert isinstance(leader, Leader)
            followers.extend(Follower(run, "d", Gathering(leads=False, timeout_s=60)) for _ in range(2))
            with wish.watching():
                tell()

    monkeypatch.setattr(muster, "_tell", say_and_be_told)
    with pytest.raises(SystemExit):
        lead()
    assert run.holder() is None
    for follower in followers:
        assert isinstance(over := follower.wait(), Over)
        assert over.exit_code == 75
        follower.leave()


def test_one_that_is_there_before_a_called_machine_begins_ends_nothing_unheard() -> None:
    """Python would end by it as it starts, with 138 or 143."""
    code = "import signal, time; print(signal.sigpending()); time.sleep(0.1)"
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=node._begin, stdout=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == f"{ {signal.SIGUSR1} }\n"
    assert process.returncode == 0
