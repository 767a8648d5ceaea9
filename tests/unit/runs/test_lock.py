from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dtrain.errors import RunError
from dtrain.runs import RunDir, check
from dtrain.runs.lock import SILENT_S, Holder

HOLD = """
import sys
from dtrain.runs import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_refused_with_who_and_the_way_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    try:
        for refuse in (lambda: run.lock().__enter__(), lambda: check(run.path)):
            with pytest.raises(RunError, match=f"process {other.pid} on .* since 20.*run.name") as caught:
                refuse()
            assert caught.value.exit_code == 2
        assert run.holder().pid == other.pid
    finally:
        other.kill()
        other.wait()
    assert run.holder() is None
    notes: list[str] = []
    with run.lock(notes.append):
        assert f"process {other.pid}" in notes[0]
        assert "taken over" in notes[0]


def test_released_when_the_block_ends_even_by_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    notes: list[str] = []
    with run.lock(notes.append):
        assert run.holder().pid == os.getpid()
    assert run.holder() is None
    assert notes == []


def test_a_later_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    me = Holder.me()
    (tmp_path / ".lock").write_text(
        json.dumps({"pid": me.pid, "host": me.host, "started": me.started - 5, "since": "x"})
    )
    assert run.holder() is None


def test_a_holder_on_another_host_lives_as_long_as_it_shows(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 1.0, "since": "x"}))
    with pytest.raises(RunError, match="process 1 on elsewhere"), run.lock():
        pass
    silent = time.time() - SILENT_S - 1
    os.utime(lock, (silent, silent))
    with run.lock():
        pass


def test_a_holder_on_a_host_of_the_same_name_is_told_by_what_it_shows(tmp_path: Path) -> None:
    """Its pid says nothing here: that of another process, or of none, as in a container of the same name."""
    run = RunDir(tmp_path)
    me = Holder.me()
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({**dataclasses.asdict(me), "pid": 2**22 + 1, "pids": "another boot pid:[1]"}))
    holder = run.holder()
    assert holder is not None
    assert not holder.is_here
    silent = time.time() - SILENT_S - 1
    os.utime(lock, (silent, silent))
    assert run.holder() is None
    os.utime(lock)
    with run.lock() as mine:  # the kernel knows of no holder: it was this container, before it was started again
        assert mine.is_here
        assert run.holder() == mine


def test_one_of_many_wins(tmp_path: Path) -> None:
    won, lost = list[int](), list[int]()
    gate, leave = threading.Barrier(8), threading.Event()

    def race(number: int) -> None:
        gate.wait()
        try:
            with RunDir(tmp_path / "r").lock():
                won.append(number)
                leave.wait(60)
        except RunError:
            lost.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(won) + len(lost) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    leave.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_a_lock_that_cannot_be_written_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # permissions do not bind root
    with pytest.raises(RunError, match=r"\.lock: cannot be written .* its own `run.name`"), RunDir(tmp_path).lock():
        pass


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_check_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"file is not a folder; set `run.dir`"):
            check(path)


def test_check_refuses_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root writes anywhere; /proc takes no folders from anyone
        with pytest.raises(RunError, match=r"cannot write in /proc \(.*\); set `run.dir`"):
            check(Path("/proc/run"))
        return
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match=r"cannot write in .*Permission denied"):
        check(tmp_path / "run")


def test_check_names_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(RunError, match="Read-only file system"):
        check(tmp_path / "run")
