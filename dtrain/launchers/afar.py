"""Other machines that are started from here: their words are shown, stops reach them, those that are down are named.

ssh and pdsh pass on what is printed and how it ended, but no signals, and pdsh no input: stops are written down in a
folder of the run, which all see anyway.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from dtrain.config.spec import Call
from dtrain.errors import RunError, UserError
from dtrain.launchers._orders import HOSTS, Orders
from dtrain.runs import RunDir, die_with_parent
from dtrain.runs.beside import SAME_PRESS_S, caught
from dtrain.runs.files import read_json, write_json
from dtrain.runs.hints import hint_of
from dtrain.runs.host import HOST

LOOK_S = 0.2
OTHERS_S = 60.0
"""Once one has failed, what the others get to end for it by themselves."""
REFUSED_S = 10.0
"""The same where it has refused what the user typed: then nothing is to be saved."""
KILL_S = 30.0
"""After a second signal, what the machines get to end."""
SILENT_S = 30.0
"""Once all are told to stop, what those get that have not begun: they have nothing to save, and one whose login hangs
would be waited for without end."""
LEFT_S = 120.0
"""Once the machine that leads has ended by itself, what the others get: they notice it within a minute."""
BEGIN_S = 60.0
"""What machines get to begin that are only asked something: a login may hang for ever."""
HANG_UP_S = 5.0
"""What ssh gets to end, once it is told to."""
LOST = 3
"""The exit code where none came: that of a worker which failed."""
_PREFIX = "head-"
_STOPS = "stops.json"
_OLD_S = 3600.0
_PDSH = re.compile(r"pdsh@[^:]*: (\S+): ssh (?:exited with exit code (\d+)|killed by signal (\d+))")
_NO_SSH = 255
"""What ssh exits with for its own sake, and not for the command's."""
BEGUN = "dtrain: begun"
"""What one of the machines says on stderr once it starts the command."""


# --- in the folder


@contextmanager
def control_folder(run: RunDir) -> Iterator[Path]:
    """A folder of this start, which is gone afterwards, as are those that starts which were killed have left."""
    made = run.nodes / f"{_PREFIX}{os.urandom(8).hex()}"
    made.mkdir(parents=True)
    # There from the start: that there is no such file, a network file system may believe for a minute.
    write_json(made / _STOPS, {"signals": []})
    now = made.stat().st_mtime
    for left in run.nodes.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if now - left.stat().st_mtime > _OLD_S and run.holder() is None:
                shutil.rmtree(left, ignore_errors=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def environment(host: str, orders: Orders) -> dict[str, str]:
    """What the command is told on one of the machines."""
    said = {"nodes": len(orders.hosts), "index": list(orders.hosts).index(host), "procs": orders.procs,
            "start": Path(orders.control).name}  # fmt: skip
    slots = orders.hosts[host]
    gpus = {} if slots is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))}
    return {HOST: host, HOSTS: json.dumps(said), **gpus}


def stops(control: Path) -> list[signal.Signals]:
    """The signals to pass on, the first one first."""
    return [signal.Signals(number) for number in (read_json(control / _STOPS) or {}).get("signals", [])]


# --- on the machine where the command is typed


@dataclasses.dataclass
class _Machine:
    name: str
    exit: int | None = None
    """Of its connection, once that has ended; negative where it was ended here."""
    begun: bool = False
    last: str = ""
    """The last line of its stderr."""

    @property
    def code(self) -> int | None:
        """What the command ended with; None where it has not, or its connection did before."""
        return self.exit if self.begun and self.exit is not None and 0 <= self.exit < _NO_SSH else None


@dataclasses.dataclass
class _Stream:
    """What a call prints on its stdout or stderr."""

    fd: int
    to: TextIO
    open: bool = True
    _rest: bytes = b""

    def read(self) -> list[str]:
        """The whole lines that are there. Raises BlockingIOError where nothing is."""
        got = os.read(self.fd, 65536)
        if not got:
            return self.close()
        lines = (self._rest + got).split(b"\n")
        self._rest = lines.pop()
        return [_text(line) for line in lines]

    def read_to_end(self) -> list[str]:
        """What is there, as the last that is to come."""
        lines = []
        with suppress(BlockingIOError):
            while self.open:
                lines += self.read()
        return lines + self.close()

    def close(self) -> list[str]:
        rest, self._rest, self.open = self._rest, b"", False
        return [_text(rest)] if rest else []


def _print(line: str, to: TextIO) -> None:
    """Also where nobody reads it any more: the run goes on, and ends with its own exit code."""
    try:
        to.write(line.encode(to.encoding or "utf-8", "replace").decode(to.encoding or "utf-8") + "\n")
        to.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, to.fileno())
        os.close(nowhere)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")


@dataclasses.dataclass
class _Line:
    """A call that is under way, or has ended."""

    call: Call
    process: subprocess.Popen[bytes]
    streams: Sequence[_Stream]
    ended: bool = False
    """And all that it printed is shown."""


class _Head:
    """Until every machine has ended. With `heard`, which takes the lines of stdout with the names of their machines,
    they are only asked: each may fail by itself, and has `within_s`.
    """

    def __init__(self, control: Path, calls: Sequence[Call], say: Callable[[str], None],
                 heard: Callable[[str, str], None] | None = None, within_s: float = 0.0) -> None:  # fmt: skip
        self._control, self._calls, self._say, self._heard = control, calls, say, heard
        self._began, self._within_s = time.monotonic(), within_s
        self._machines = {name: _Machine(name) for call in calls for name in call.hosts}
        self._labels = _labels(self._machines)
        self._lines: list[_Line] = []
        self._signals: list[int] = []
        self._told_at = 0.0
        self._told: list[int] = []
        self._stopping_at: float | None = None
        """Since when they are told to stop."""
        self._led_until: float | None = None
        """When the machine that leads has ended by itself."""
        self._give_up_at: float | None = None
        self._given_up = False
        self._ended: list[_Machine] = []
        """The first one first."""

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Only takes note: the loop acts."""
        signum = signal.SIGTERM if signum == signal.SIGHUP else signum
        now = time.monotonic()
        firm = any(one != signal.SIGUSR1 for one in self._signals)
        if self._signals and (signum == signal.SIGUSR1 or (firm and now - self._told_at <= SAME_PRESS_S)):
            return
        if not self._forced:
            self._told_at = now
        self._signals.append(signum)

    @property
    def _forced(self) -> bool:
        """Told a second time, which SIGUSR1 is no first time for: its ranks end at once."""
        return len([one for one in self._signals if one != signal.SIGUSR1]) > 1

    def run(self) -> int:
        self._until_all_have_ended()
        return self._verdict()

    def ask(self) -> dict[str, str | None]:
        """Of each machine, why it did not answer, or not to the end; None where it did."""
        self._until_all_have_ended()
        return {one.name: self._unanswered(one) for one in self._machines.values()}

    def _unanswered(self, one: _Machine) -> str | None:
        if not one.begun:
            return _why_not(one)
        if one.code is None:
            return f"it had not ended within {self._within_s:.0f} s" if one.exit and one.exit < 0 else _lost(one)
        return (one.last.removeprefix("error: ") or f"exit code {one.code}") if one.code > 1 else None

    def _until_all_have_ended(self) -> None:
        with selectors.DefaultSelector() as selector:
            try:
                for call in self._calls:
                    self._lines.append(_start(call))
                    for stream in self._lines[-1].streams:
                        selector.register(stream.fd, selectors.EVENT_READ, (self._lines[-1], stream))
                while not all(line.ended for line in self._lines):
                    self._show(selector)
                    self._look(selector)
            finally:
                self._hang_up()

    def _show(self, selector: selectors.BaseSelector) -> None:
        """What the machines print, each line with its name."""
        if not selector.get_map():
            time.sleep(LOOK_S)
        for key, _ in selector.select(LOOK_S):
            line, stream = key.data
            for text in stream.read():
                self._take(line.call, stream.to, text)
            if not stream.open:
                selector.unregister(stream.fd)

    def _take(self, call: Call, to: TextIO, line: str) -> None:
        if not call.named:
            label, text = call.hosts[0], line
        elif (ended := _PDSH.match(line)) and ended[1] in self._labels:
            self._take_end(self._labels[ended[1]], int(ended[2]) if ended[2] else -int(ended[3]))
            return
        else:
            label, _, text = line.partition(": ")
        one = self._labels.get(label)
        if one is not None and text == BEGUN:
            one.begun = True
            return
        if one is not None:
            if to is sys.stderr and text.strip():
                one.last = text.strip()
            if self._heard is not None and to is sys.stdout:
                self._heard(one.name, text)
            line = f"{one.name}: {text}"
        if self._heard is None:
            _print(line, to)

    def _look(self, selector: selectors.BaseSelector) -> None:
        for line in self._lines:
            if not line.ended and line.process.poll() is not None:
                self._close(line, selector)
        now = time.monotonic()
        if self._heard is not None:
            self._look_at_clock(now - self._began)
            return
        self._given_up = self._given_up or (self._give_up_at is not None and now >= self._give_up_at)
        told = self._signals or ([signal.SIGTERM] if self._given_up else [])
        if told != self._told:
            if not self._told and self._signals:
                self._say(f"{signal.Signals(told[0]).name}: the run saves and stops; again: at once")
            self._told = list(told)
            self._stopping_at = now if self._stopping_at is None else self._stopping_at
            write_json(self._control / _STOPS, {"signals": [int(one) for one in told]})
        if self._forced and now - self._told_at > KILL_S:
            self._hang_up()
        alive = [one for one in self._machines.values() if one.exit is None]
        left = self._led_until is not None and now - self._led_until > LEFT_S
        silent = self._stopping_at is not None and now - self._stopping_at > SILENT_S
        if left or (silent and not any(one.begun for one in alive)):
            self._hang_up()

    def _look_at_clock(self, since_s: float) -> None:
        for line in self._lines:
            begun = any(self._machines[name].begun for name in line.call.hosts)
            if not line.ended and since_s > (self._within_s if begun else BEGIN_S):
                line.process.terminate()

    def _close(self, line: _Line, selector: selectors.BaseSelector) -> None:
        """It has ended. Its pipes need not: a connection that ssh keeps for others holds them."""
        for stream in line.streams:
            if stream.open:
                selector.unregister(stream.fd)
            for text in stream.read_to_end():
                self._take(line.call, stream.to, text)
        line.ended = True
        code = line.process.returncode
        for name in line.call.hosts:  # those that failed have been named; unless it has started none at all
            one = self._machines[name]
            self._take_end(one, min(code, 0) if line.call.named and one.begun else code)

    def _take_end(self, one: _Machine, exit_: int) -> None:
        """Note how its connection ended; after a failure the machines that are still there are told to stop."""
        if one.exit is not None:
            return
        one.exit = exit_
        self._ended.append(one)
        if self._heard is not None:
            return
        if one is next(iter(self._machines.values())) and one.code is not None:
            self._led_until = time.monotonic()
        if exit_:
            patience_s = 0.0 if not one.begun else REFUSED_S if exit_ == UserError.exit_code else OTHERS_S
            at = time.monotonic() + patience_s
            self._give_up_at = at if self._give_up_at is None else min(at, self._give_up_at)

    def _hang_up(self) -> None:
        """A machine whose connection ends has its ranks save and end."""
        for line in self._lines:
            if line.process.poll() is None:
                line.process.terminate()
        for line in self._lines:
            with suppress(subprocess.TimeoutExpired):
                line.process.wait(HANG_UP_S)
            if line.process.poll() is None:
                line.process.kill()
                line.process.wait()

    def _verdict(self) -> int:
        """The leader's exit code, or that of the machine for which the others were stopped; raises RunError with those
        that did not start.
        """
        codes = [one.code for one in self._ended if one.code is not None]
        if self._signals and not codes:
            return 128 + self._signals[0]
        if not self._signals and (down := [one for one in self._ended if not one.begun]):
            raise RunError.of(_down(one) for one in down)
        for one in self._ended:
            if one.code is None and one.begun:
                self._say(f"{one.name}: {_lost(one)}")
        leader = next(iter(self._machines.values()))
        if leader.code is not None and not self._given_up:
            return leader.code
        return next((code for code in codes if code), LOST if leader.code is None else leader.code)


def _labels(machines: Mapping[str, _Machine]) -> dict[str, _Machine]:
    """By what their lines begin with: pdsh leaves out a domain that all have in common."""
    short = [name.partition(".")[0] for name in machines]
    of = {label: one for label, one in zip(short, machines.values(), strict=True) if short.count(label) == 1}
    return {**of, **machines}


def _start(call: Call) -> _Line:
    argv = list(call.command.argv)
    try:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **call.command.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us to pass on
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    except FileNotFoundError:
        raise RunError(
            f"{argv[0]}: not found; install it (openssh-client, pdsh), or take another launcher.by"
        ) from None
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # what it died of, it says
        process.stdin.write(b"" if call.unread else call.told)
        process.stdin.flush()
    streams = []
    for source, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        assert source is not None
        os.set_blocking(source.fileno(), False)
        streams.append(_Stream(source.fileno(), to))
    return _Line(call, process, streams)


def _lost(one: _Machine) -> str:
    return f"its connection has ended: {one.last or 'without a word'}"


def _down(one: _Machine) -> str:
    return f"{one.name}: could not be started: {_why_not(one)}"


def _why_not(one: _Machine) -> str:
    why = hint_of(one.last)
    silent = one.exit is not None and one.exit < 0
    ended = "it did not answer; try `ssh` to it by hand" if silent else f"ended with {one.exit}, without a word"
    said = one.last.removeprefix("error: ") or ended
    return said + (f"; {why}" if why else "")


def ask(
    control: Path, calls: Sequence[Call], heard: Callable[[str, str], None], within_s: float
) -> dict[str, str | None]:
    """Start them all and wait for their end, or until they have had their time; `heard` takes each line of stdout, with
    the machine's name. Returns of each why it did not answer, or not to the end; None where it did.
    """
    return _Head(control, calls, lambda line: None, heard, within_s).ask()


def see_through(control: Path, calls: Sequence[Call], say: Callable[[str], None]) -> int:
    """Start them all and wait for their end; returns the exit code of the run.

    The first SIGINT, SIGTERM or SIGUSR1 is passed on, a second SIGINT or SIGTERM ends the ranks at once. Raises
    RunError with the machines that could not be started; the others are told to stop. To be called in the main thread.
    """
    head = _Head(control, calls, say)
    with caught(head.on_signal):
        return head.run()
