"""Locks of real processes: who waits, what is said, and who takes over."""

import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest

from dtrain.data import once
from dtrain.data.once import alone, remove_locks


def hold(lock, began, end):
    with alone(lock, "it", lambda line: None) as tell:
        tell("half way")
        began.set()
        end.wait(300)


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock until told to end."""
    context = multiprocessing.get_context("spawn")
    began, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / ".it.lock", began, end))
    process.start()
    assert began.wait(120)
    yield process, end
    process.kill()
    process.join()


def wait_for(condition, timeout_s=100):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_one_waits_until_the_other(tmp_path, holder, monkeypatch, how):
    monkeypatch.setattr(once, "_POLL_S", 0.01)
    process, end = holder
    lock, said, got = tmp_path / ".it.lock", [], []

    def take():
        with alone(lock, "it", said.append):
            got.append(process.is_alive() and not end.is_set())

    thread = threading.Thread(target=take)
    thread.start()
    wait_for(lambda: said)
    assert said[0].startswith(f"waiting for it: process {process.pid} on ")
    assert said[0].endswith((": beginning", ": half way"))
    assert not got
    if how == "ends":
        end.set()
    else:
        os.kill(process.pid, signal.SIGKILL)
    thread.join(100)
    assert got == [False]
    assert said[-1] == "waited for it: the other process has ended"
    assert not list(tmp_path.iterdir())


def test_how_far_the_other_is_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(once, "_SAY_EVERY_S", 0.0)
    lock, said = tmp_path / ".it.lock", []
    with alone(lock, "it", said.append) as tell:
        thread = threading.Thread(target=lambda: alone(lock, "it", said.append).__enter__())
        thread.start()
        wait_for(lambda: said)
        tell("half way")
        wait_for(lambda: said[-1].endswith(": half way"))
    thread.join(100)
    assert [line.rpartition(": ")[2] for line in said] == ["beginning", "half way", "the other process has ended"]


def test_locks_that_nobody_holds_are_removed(tmp_path, holder):
    (tmp_path / ".data-1.lock").touch()
    (tmp_path / "data-1").mkdir()
    remove_locks(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".it.lock", "data-1"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    with alone(tmp_path / ".it.lock", "it", said.append) as tell:
        tell("on its way")
    assert said == [f"{tmp_path}: this file system has no locks; another launch may prepare it at the same time"]
    assert not list(tmp_path.iterdir())
