"""The machine that calls others, with a shell of this one in the place of ssh or pdsh."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dtrain.config.spec import Call, Command
from dtrain.errors import RunError
from dtrain.launchers import afar
from dtrain.launchers.afar import BEGUN, control_folder, see_through
from dtrain.runs import RunDir
from dtrain.runs.files import read_json

GOES_ON = f"echo '{BEGUN}' >&2; touch begun; until [ -s stops.json ]; do sleep 0.05; done;"
ONCE_IT_GOES_ON = "until [ -e begun ]; do sleep 0.05; done;"


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(shell: str, *hosts: str) -> Call:
    return Call(hosts, Command(["sh", "-c", shell], {}), b"", unread=True, named=len(hosts) > 1)


def run(control: Path, calls: Sequence[Call], said: list[str] | None = None) -> int:
    return see_through(control, calls, (said if said is not None else []).append)


def test_each_line_is_shown_with_its_machine(control: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls = [call(f"echo '{BEGUN}' >&2; echo one; printf 'two'", "a"),
             call(f"echo '{BEGUN}' >&2; echo 'three: x' >&2", "b")]  # fmt: skip
    assert run(control, calls) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["a: one", "a: two"]
    assert err.splitlines() == ["b: three: x"]


def test_a_reader_that_goes_away_ends_no_run(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `dtrain launch ... | head`, and on a terminal that knows fewer letters than the machines print."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="latin-1") as out:
        monkeypatch.setattr(sys, "stdout", out)
        text = f"echo '{BEGUN}' >&2; for i in 1 2 3; do echo \u2713; sleep 0.1; done; exit 75"
        assert run(control, [call(text, "a")]) == 75


def test_the_exit_code_is_the_leaders(control: Path) -> None:
    for code in (0, 75, 3):
        (control / "stops.json").unlink(missing_ok=True)
        begun = f"echo '{BEGUN}' >&2;"
        assert run(control, [call(f"{begun} exit {code}", "a"), call(f"{begun} exit 75", "b")]) == code


def test_machines_that_cannot_be_started_are_named_and_the_others_stopped(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [
        call(f"{GOES_ON} exit 75", "a"),
        call(f"{ONCE_IT_GOES_ON} echo 'error: no such folder' >&2; exit 2", "b"),
        call(f"{ONCE_IT_GOES_ON} exit 255", "c"),
    ]
    monkeypatch.setattr(afar, "OTHERS_S", 1000.0)
    monkeypatch.setattr(afar, "REFUSED_S", 1000.0)
    with pytest.raises(RunError) as caught:
        run(control, calls)
    assert str(caught.value).splitlines() == [
        "b: could not be started: no such folder",
        "c: could not be started: ended with 255, without a word",
    ]
    assert afar.stops(control) == [signal.SIGTERM]


def test_a_machine_that_never_answers_is_not_waited_for(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "SILENT_S", 0.3)
    with pytest.raises(RunError) as caught:
        run(
            control,
            [call(f"{GOES_ON} exit 75", "a"), call(f"{ONCE_IT_GOES_ON} exit 255", "b"), call("exec sleep 600", "c")],
        )
    assert str(caught.value).splitlines() == [
        "b: could not be started: ended with 255, without a word",
        "c: could not be started: it did not answer; try `ssh` to it by hand",
    ]


def test_a_machine_that_does_not_end_is_not_waited_for(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "LEFT_S", 0.5)
    began = time.monotonic()
    calls = [
        call(f"echo '{BEGUN}' >&2; {ONCE_IT_GOES_ON}", "a"),
        call(f"echo '{BEGUN}' >&2; touch begun; exec sleep 600", "b"),
    ]
    assert run(control, calls) == 0
    assert time.monotonic() - began < 100


def test_what_one_has_refused_ends_the_others_after_a_while(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "REFUSED_S", 0.2)
    calls = [call(f"{GOES_ON} exit 143", "a"), call(f"echo '{BEGUN}' >&2; exit 2", "b")]
    assert run(control, calls) == 2


def test_a_connection_that_is_lost_is_said(control: Path) -> None:
    said: list[str] = []
    lost = f"echo '{BEGUN}' >&2; echo 'Timeout, server b not responding.' >&2; exit 255"
    assert run(control, [call(f"echo '{BEGUN}' >&2; sleep 0.3; exit 75", "a"), call(lost, "b")], said) == 75
    assert said == ["b: its connection has ended: Timeout, server b not responding."]
    assert run(control, [call(lost, "a")], said) == 3


def test_of_several_that_one_program_calls(control: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (f"for h in a b c; do echo \"$h: {BEGUN}\" >&2; done; echo 'b: out'; echo 'pdsh@x: c: ssh exited with exit code 75' "
            f">&2; echo 'pdsh@x: a: ssh exited with exit code 75' >&2; echo 'pdsh: of its own' >&2; exit 75")  # fmt: skip
    assert run(control, [call(text, "a", "b", "c")]) == 75
    out, err = capfd.readouterr()
    assert out == "b: out\n"
    assert err == "pdsh: of its own\n"


PDSH = ["pdsh", "-R", "ssh", "-S", "-w"]


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
@pytest.mark.parametrize("hosts", [["w-0"], ["w-0.a.b", "w-1.a.b"], ["w-0.a.b", "w-1.a.c"], ["10.0.0.2", "10.0.0.3"]])
def test_machines_as_pdsh_names_them(
    hosts: list[str], control: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (control / "ssh").write_text(f"#!/bin/sh\necho '{BEGUN}' >&2\necho out\nexit 75\n")
    (control / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{control}:{os.environ['PATH']}")
    pdsh = Call(hosts, Command([*PDSH, ",".join(hosts), "x"], {}), b"", unread=True, named=True)
    assert run(control, [pdsh]) == 75
    assert sorted(capfd.readouterr().out.splitlines()) == [f"{host}: out" for host in hosts]


def test_a_connection_that_is_killed_is_no_end(control: Path) -> None:
    text = f"echo 'a: {BEGUN}' >&2; echo 'b: {BEGUN}' >&2; echo 'pdsh@x: a: ssh killed by signal 9' >&2; exit 0"
    assert run(control, [call(text, "a", "b")]) == afar.LOST


def test_pdsh_that_starts_none_says_so(control: Path) -> None:
    with pytest.raises(RunError, match="a: could not be started: ended with 1"):
        run(control, [call("exit 1", "a", "b")])


def test_a_connection_that_ssh_keeps_for_others_is_not_waited_for(control: Path) -> None:
    began = time.monotonic()
    try:
        assert run(control, [call(f"echo '{BEGUN}' >&2; sleep 600 & echo $! >kept; exit 0", "a")]) == 0
    finally:
        os.kill(int((control / "kept").read_text()), signal.SIGKILL)
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("pressed", [[signal.SIGINT], [signal.SIGUSR1, signal.SIGTERM], [signal.SIGTERM]])
def test_signals_are_written_down_for_them(control: Path, pressed: list[signal.Signals]) -> None:
    said: list[str] = []
    last = f"until grep -q {pressed[-1].value} stops.json; do sleep 0.05; done"
    presses = threading.Thread(target=_press, args=(pressed, control))
    presses.start()
    assert run(control, [call(f"echo '{BEGUN}' >&2; touch begun; {last}; exit 75", "a")], said) == 75
    presses.join()
    assert afar.stops(control) == pressed
    assert said == [f"{pressed[0].name}: the run saves and stops; again: at once"]


@pytest.mark.parametrize("pressed", [[signal.SIGUSR1, signal.SIGUSR1], [signal.SIGUSR1, signal.SIGTERM]])
def test_sigusr1_and_another_signal_are_no_second_press(
    pressed: list[signal.Signals], control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that takes longer than `KILL_S` is waited for."""
    monkeypatch.setattr(afar, "KILL_S", 0.3)
    presses = threading.Thread(target=_press, args=(pressed, control))
    presses.start()
    assert run(control, [call(f"echo '{BEGUN}' >&2; touch begun; sleep 1.5; exit 75", "a")]) == 75
    presses.join()


def _press(pressed: Sequence[signal.Signals], control: Path) -> None:
    while not (control / "begun").exists():
        time.sleep(0.02)
    for one in pressed:
        signal.raise_signal(one)
        while not (control / "stops.json").exists():
            time.sleep(0.02)


def test_machines_that_are_only_asked_fail_each_by_itself(
    control: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(afar, "BEGIN_S", 2.5)
    heard: list[tuple[str, str]] = []
    calls = [
        call("echo 'error: no such folder' >&2; exit 2", "refused"), call("exec sleep 60", "silent"),
        call(f"echo '{BEGUN}' >&2; sleep 0.5; echo one; echo two; exit 1", "well"),
        call(f"echo '{BEGUN}' >&2; echo 'error: no such check' >&2; exit 2", "other"),
        call(f"echo '{BEGUN}' >&2; exec sleep 60", "slow"), call(f"echo '{BEGUN}' >&2; echo bye >&2; exit 255", "lost"),
    ]  # fmt: skip
    why = afar.ask(control, calls, lambda name, line: heard.append((name, line)), within_s=4.0)
    assert why == {
        "refused": "no such folder", "silent": "it did not answer; try `ssh` to it by hand", "well": None,
        "other": "no such check", "slow": "it had not ended within 4 s", "lost": "its connection has ended: bye",
    }  # fmt: skip
    assert heard == [("well", "one"), ("well", "two")]
    assert capfd.readouterr() == ("", "")


def test_what_is_not_installed(control: Path) -> None:
    with pytest.raises(RunError, match="no-ssh: not found; install it"):
        run(control, [Call(["a"], Command(["no-ssh"], {}), b"")])


def test_the_folder_is_gone_afterwards(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with control_folder(run_dir) as made:
        assert made.is_dir()
        assert read_json(made / "stops.json") == {"signals": []}
        with control_folder(run_dir):
            assert made.is_dir()
    assert list(run_dir.nodes.iterdir()) == []
