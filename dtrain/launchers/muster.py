"""The machines of one run find each other in its folder: one leads, the others do as it says and report to it.

Each that follows has a folder of its own under `.nodes`, by a random name, so that nothing of an earlier start can be
taken for this one's: `here.json` and `end.json` are its word, the others the leader's. All are there from the start,
empty: that there is no such file, a network file system may believe for a minute. Who has gone is seen by what it no
longer touches; no clock of one machine is compared with that of another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.config.spec import Gathering, Meeting
from dtrain.errors import DtrainError, RunError
from dtrain.launchers._network import interface_of, towards
from dtrain.launchers._watch import NAP_S
from dtrain.launchers.verdict import NodeEnd
from dtrain.runs import RunDir
from dtrain.runs.files import read_json, replace_json, write_json
from dtrain.runs.host import free_port, host_name, network
from dtrain.runs.lock import BEAT_S, Holder

LOOK_S = 0.2
TOUCH_S = 1.0
"""How often one that follows shows that it lives."""
SILENT_S = 45.0
"""After which one that does not is gone: a network file system may show a touch late."""
LATE_S = 20.0
"""What the others get to report, once the leader's own ranks have ended."""
WAKE_S = 2 * BEAT_S
"""What a leader on another machine gets to show that it lives, once this one was suspended."""
GONE_S = 8.0
"""After a failure, one that has not been heard of for this long is not waited for, where its touches were seen in time
so far."""
CLOSED_S = 10.0
"""How long one that waits for a word lets a leader be that would take in nobody: it may have begun just now."""
HERE, END = "here.json", "end.json"
GO, OVER = "go.json", "over.json"
"""The second also beside the folders, for those that come when their start is over."""
STOP = "stop.json"
"""The leader's word that another machine's ranks have failed."""
OPEN = "open"
"""Names the leader while it waits for others, or would take them in."""
_ANOTHER = "another configuration than on the machine that leads; type the same command on each machine"
_NAMESAKE = ("the machine that leads has the same name, so that its address cannot be found; give each a name of its "
             "own (hostnamectl set-hostname), or type launcher.host=ADDRESS, that of the one that is to lead"
             )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Go:
    """The leader's word to one that follows."""

    attempt: int
    node: int
    host: str
    port: int
    id: str
    left_s: float | None
    """Until the job's time is over, when this is written."""
    nodes: int
    """Machines that take part."""
    leader: dict[str, Any]
    """Who holds the run's lock meanwhile: whoever else does leads another start."""


class _Awake:
    """Seconds that this process was awake, which a job's need not be: others that were suspended with it come back a
    moment later.
    """

    def __init__(self) -> None:
        self._looked_at, self._awake_s = time.monotonic(), 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self._awake_s += min(now - self._looked_at, NAP_S)
        self._looked_at = now
        return self._awake_s


class _Touched:
    """Whether a file of another machine is still touched, by this machine's own clock."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._clock, self._began = path, clock, time.monotonic()
        self._last, self._since = self._stamp(path), clock()
        self._longest_s = 0.0
        self.moved = False

    @property
    def was_left(self) -> bool:
        """Never touched, for as long as one that lives never is."""
        self.silent_s()
        return not self.moved and time.monotonic() - self._began > SILENT_S

    def silent_s(self) -> float:
        """Without end where its machine has taken it away."""
        stamp, now = self._stamp(self._path), self._clock()
        if stamp == math.inf:
            return math.inf
        if stamp not in (None, self._last):
            self._longest_s = max(self._longest_s, now - self._since) if self.moved else 0.0
            self._last, self._since, self.moved = stamp, now, True
        return now - self._since

    def is_gone(self) -> bool:
        """Whether it is silent for much longer than it ever was."""
        return self.silent_s() > min(SILENT_S, max(GONE_S, 4 * self._longest_s))

    @staticmethod
    def _stamp(path: Path) -> float | None:
        """None where it cannot be told now."""
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return math.inf
        except OSError:
            return None


@dataclasses.dataclass(frozen=True)
class Over:
    """The leader's word that there is nothing more to do."""

    exit_code: int
    message: str = ""
    again: bool = False
    """But for another start, for which all meet anew."""


@dataclasses.dataclass
class _Member:
    folder: Path
    host: str
    touched: _Touched
    node: int = 0
    namesake: bool = False
    """Its name is the leader's, and its addresses are others."""


class Leader:
    """Holds the run's lock."""

    node = 0

    @property
    def nodes(self) -> int:
        """Machines that take part."""
        return len(self._members) + 1

    def __init__(self, run: RunDir, gathering: Gathering, num_others: int, digest: str, holder: Holder,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        self._run, self._gathering, self._num_others = run, gathering, num_others
        self._digest, self._holder, self._say = digest, holder, say
        self._members: list[_Member] = []
        self._awake = _Awake()
        self._seen = {folder.name: _Touched(folder / HERE, self._awake) for folder in _folders(run)}
        self._before = frozenset(self._seen)
        """May have been left by a machine that was killed, until they are touched."""
        self._beat_at = 0.0
        self.token = secrets.token_hex(8)

    def meet(self, attempt: int, deadline: float | None) -> Meeting:
        """Tell the others, who have come, where to meet; `deadline`: by this machine's clock, when the time is over."""
        host = self._gathering.host or self._address()
        port, name = self._gathering.port or free_port(), secrets.token_hex(8)
        nodes, left_s = self.nodes, None if deadline is None else deadline - time.time()
        for member in self._members:
            go = Go(attempt, member.node, host, port, name, left_s, nodes, dataclasses.asdict(self._holder))
            with contextlib.suppress(FileNotFoundError):  # of one that has left, which is seen at once
                replace_json(member.folder / GO, dataclasses.asdict(go))
        self._run.joined.unlink(missing_ok=True)
        if nodes > self._num_others:
            (self._run.nodes / OPEN).unlink(missing_ok=True)
            too_many = Over(2, f"launcher.nodes={nodes}: that many machines have come already")
            for folder in self._others():
                if not _is_told(folder):  # else it may be another leader's, and will see that that one is gone
                    _tell(folder / OVER, dataclasses.asdict(too_many))
        local = self._address()
        return Meeting(host, port, name, is_host=True, local=local, interface=interface_of(local))

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._run.beat()

    def trouble(self) -> str | None:
        """What another machine has met, in words; None where all is well."""
        for member in self._members:
            end = self._report(member)
            if end is not None and end.returncode:
                return f"node {member.node} on {member.host} has failed"
            silent_s = 0.0 if end is not None else member.touched.silent_s()
            if silent_s == math.inf:
                return f"node {member.node} on {member.host} has left"
            if silent_s > SILENT_S:
                return f"node {member.node} on {member.host} has not been heard of for {SILENT_S:.0f} s"
        return None

    def come(self) -> str | None:
        """The host of a machine that waits to take part in a run that has begun; one with another configuration is sent
        away.
        """
        if len(self._members) >= self._num_others:
            return None
        host = None
        for folder in self._others():
            if (said := self._waits(folder)) is None or self._is_of_another_start(folder, said):
                continue
            if (why := self._misfit(said)) is None:
                host = str(said.get("host"))
            else:
                self._send_away(folder, said, why)
        return host

    def _is_of_another_start(self, folder: Path, said: dict[str, Any]) -> bool:
        """Of the same run: its own leader was refused, and it is sent away."""
        if said.get("start") == self._gathering.start:
            return False
        self._send_away(folder, said, "this run was started twice, and another start of it leads")
        return True

    def _misfit(self, said: dict[str, Any]) -> str | None:
        """Why a machine that has come can take no part; None where it can."""
        if said.get("digest") != self._digest:
            return _ANOTHER
        return _NAMESAKE if _is_namesake(said) and self._gathering.host is None else None

    def _send_away(self, folder: Path, said: dict[str, Any], why: str) -> None:
        self._say(f"{said.get('host')}: {why}; it is sent away")
        _tell(folder / OVER, dataclasses.asdict(Over(2, f"{self._run.path}: {why}")))

    def reports(self, *, failed: bool) -> list[NodeEnd]:
        """How the others ended, once all have, or had their time; `failed`: they are not to go on."""
        if failed:
            for member in self._members:
                _tell(member.folder / STOP, {})
        deadline = time.monotonic() + LATE_S
        while time.monotonic() < deadline:
            self.beat()
            waiting = [one for one in self._members if self._report(one) is None and not one.touched.is_gone()]
            if not waiting:
                break
            time.sleep(LOOK_S)
        return [end for end in map(self._report, self._members) if end is not None]

    def lost(self) -> str | None:
        """The machines that have ended without a word; None where none has."""
        names = [f"node {one.node} on {one.host}" for one in self._members
                 if self._report(one) is None and one.touched.is_gone()]  # fmt: skip
        return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} gone" if names else None

    def dismiss(self, exit_code: int, message: str = "") -> None:
        """Tell the others, also those that wait in vain and those that are still to come, that it is over."""
        (self._run.nodes / OPEN).unlink(missing_ok=True)
        over = dataclasses.asdict(Over(exit_code, message))
        if self._gathering.start is not None:
            _tell(self._run.nodes / OVER, {"start": self._gathering.start, **over})
        for folder in _folders(self._run):
            _tell(folder / OVER, over)

    def send_back(self) -> None:
        """Tell those that took part that all meet anew. None is told that waits in vain: it may be needed then."""
        for member in self._members:
            _tell(member.folder / OVER, dataclasses.asdict(Over(0, again=True)))

    def forget(self) -> None:
        """Remove what machines have left that were killed, or went before the last word; the others remove their own,
        once they have read it there. Where this one ends before it can tell, a later one removes it.
        """
        (self._run.nodes / OPEN).unlink(missing_ok=True)
        for name in self._before:
            if self._seen[name].was_left:
                shutil.rmtree(self._run.nodes / name, ignore_errors=True)
        for member in self._members:
            if not (member.folder / HERE).exists():
                shutil.rmtree(member.folder, ignore_errors=True)

    def wait(self) -> int:
        """Until the others have come, or enough of them and no further one for a while; returns how many machines there
        are, this one too. Raises RunError where they do not come.
        """
        most, least = self._num_others + 1, self._gathering.least or self._num_others + 1
        changed = time.monotonic()
        deadline, told = changed + self._gathering.timeout_s, -1
        while True:
            here = self._here()
            if len(here) >= self._num_others:
                break
            if len(here) != told:
                told, changed = len(here), time.monotonic()
                enough = f", and {self._gathering.last_call_s:g} s for a further one" if told + 1 >= least else ""
                self._say(f"waiting for {max(least, told + 1) - told - 1} of {least} machines{enough}"
                          + "".join(f"; {one.host} is here" for one in here))  # fmt: skip
            if told + 1 >= least and time.monotonic() - changed >= self._gathering.last_call_s:
                break
            if told + 1 < least and time.monotonic() > deadline:
                few = "" if least == most else "at least "
                raise RunError(f"launcher.nodes={few}{least}: only {len(here) + 1} came within "
                               f"{self._gathering.timeout_s:.0f} s: {host_name()}"
                               + "".join(f", {one.host}" for one in here)
                               + "; the same command is to be started on each, and run.dir to be seen by all"
                               )  # fmt: skip
            self.beat()
            time.sleep(LOOK_S)
        self._members = here[: self._num_others]
        for node, member in enumerate(self._members, 1):
            member.node = node
        return self.nodes

    def _here(self) -> list[_Member]:
        """Those that wait now. Raises RunError where one has been told something else and all are needed; a run that
        may do with fewer, and perhaps is on its way, does without it.
        """
        found = []
        for folder in _folders(self._run):
            if (said := self._waits(folder)) is None or self._is_of_another_start(folder, said):
                continue
            if (why := self._misfit(said)) is not None:
                if self._gathering.least is None:
                    raise RunError(f"{said.get('host')}: {why}")
                self._send_away(folder, said, why)
                continue
            found.append(_Member(folder, str(said.get("host")), self._seen[folder.name], namesake=_is_namesake(said)))
        return found

    def _waits(self, folder: Path) -> dict[str, Any] | None:
        """What the machine said that waits there now; None where it does not, has its place in a start that another one
        has led, or may have been killed.
        """
        said = read_json(folder / HERE)
        if said is None or _is_told(folder):
            return None
        touched = self._seen.setdefault(folder.name, _Touched(folder / HERE, self._awake))
        if touched.silent_s() > SILENT_S or (folder.name in self._before and not touched.moved):
            return None
        return said

    def _others(self) -> list[Path]:
        """Folders of machines that take no part."""
        chosen = {member.folder for member in self._members}
        return [folder for folder in _folders(self._run) if folder not in chosen]

    def _address(self) -> str:
        """By which the others reach this machine."""
        ways = (towards(one.host) for one in self._members if not one.namesake)
        # The names of others may say nothing here, as in a cluster whose pods have names of a service.
        return next((way for way in ways if way is not None), None) or self._gathering.host or socket.gethostname()

    def _report(self, member: _Member) -> NodeEnd | None:
        said = read_json(member.folder / END)
        return None if said is None else NodeEnd.from_dict(said)


class Follower:
    """Does as the leader says. Its folder is gone afterwards; `enter` makes it."""

    def __init__(self, run: RunDir, digest: str, gathering: Gathering) -> None:
        self._run, self._gathering = run, gathering
        self.token = secrets.token_hex(8)
        self._folder = run.nodes / self.token
        self._touched_at = self._looked_at = self._open_at = time.monotonic()
        self._woke_at = -math.inf
        self._led = True
        self._reported = False
        """And is to hear the last word."""
        self._leader: Holder | None = None
        """Whoever has said that it is to go; it follows nobody else."""
        self.node = self.nodes = -1
        """Known once the leader has said it."""
        self._folder.mkdir(parents=True)
        for word in (GO, OVER, STOP, END):
            (self._folder / word).touch()
        write_json(self._folder / HERE, {"host": host_name(), "network": network(), "digest": digest,
                                         "start": gathering.start})  # fmt: skip

    def wait(self) -> Go | Over | None:
        """The leader's word; None where there is no leader any more, and any may lead.

        Raises RunError where none comes.
        """
        began = time.monotonic()
        while True:
            led = self._is_led()  # first: a leader says its last word before it goes
            if (over := self._over()) is not None:
                return over
            if (said := read_json(self._folder / GO)) is not None:
                go = Go(**said)
                self.node, self.nodes, self._leader = go.node, go.nodes, Holder(**go.leader)
                return go
            if led:
                began = time.monotonic()
                if self._gathering.leads is None and began - self._open_at > CLOSED_S:
                    raise RunError(f"{self._run.path}: the run has begun without this machine: as many have come as "
                                   f"launcher.nodes says")  # fmt: skip
            elif self._gathering.leads is None:
                return None
            elif time.monotonic() - began > self._gathering.timeout_s:
                raise RunError(f"{self._run.path}: no machine leads; it waited {self._gathering.timeout_s:.0f} s for "
                               f"{self._gathering.host or 'the first one'} to take the folder")  # fmt: skip
            self.beat()
            time.sleep(LOOK_S)

    def meeting(self, go: Go) -> Meeting:
        local = towards(go.host) or socket.gethostname()
        return Meeting(go.host, go.port, go.id, is_host=False, local=local, interface=interface_of(local))

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._touched_at >= TOUCH_S:
            self._touched_at = now
            with contextlib.suppress(OSError):
                (self._folder / "here.json").touch()

    def come(self) -> str | None:
        """To see to that is the leader's."""
        return None

    def lost(self) -> str | None:
        """And to that."""
        return None

    def trouble(self) -> str | None:
        if read_json(self._folder / STOP) is not None:
            return "another node has failed"
        return None if self._is_led() else "the node that leads is gone"

    def report(self, end: NodeEnd) -> None:
        """Tell the leader how this machine's ranks ended."""
        _tell(self._folder / END, end.as_dict())
        self._reported = True

    def last_word(self) -> Over | None:
        """The leader's; None where it is gone."""
        while True:
            led = self._is_led()
            if (over := self._over()) is not None or not led:
                self._reported = False
                return over
            self.beat()
            time.sleep(LOOK_S)

    def _over(self) -> Over | None:
        said = read_json(self._folder / OVER)
        if said is None and self._gathering.start is not None:
            last = read_json(self._run.nodes / OVER) or {}
            said = last if last.pop("start", None) == self._gathering.start else None
        return None if said is None else Over(**said)

    def _is_led(self) -> bool:
        """Looks at the lock now and then: on another machine that makes a file, to tell the time by."""
        now = time.monotonic()
        if now - self._looked_at >= TOUCH_S:
            if now - self._looked_at > NAP_S:
                self._woke_at = now
            self._looked_at, holder = now, self._run.holder()
            if holder is not None and _is_open(self._run, holder):
                self._open_at = now
            if holder is not None:
                self._led = self._leader in (None, holder)
            elif now - self._woke_at > WAKE_S:  # else suspended with this machine, perhaps, and not heard of since
                self._led = False
        return self._led

    def leave(self) -> None:
        """First it is no longer here, then its folder goes, in one step, so that no word comes into one that is half
        gone. How its ranks ended stays there where it goes before the leader's last word: the leader removes it.
        """
        with contextlib.suppress(OSError):
            (self._folder / HERE).unlink()
        if self._reported:
            return
        gone = self._run.nodes / f".{self.token}"
        with contextlib.suppress(OSError):
            self._folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


Team = Leader | Follower


@contextmanager
def enter(run: RunDir, gathering: Gathering, num_nodes: int, digest: str,
          say: Callable[[str], None]) -> Iterator[Team]:  # fmt: skip
    """Lead or follow. Raises RunError where the run's folder is in use by a run that waits for nobody."""
    began = time.monotonic()
    while gathering.leads is not False:
        with contextlib.ExitStack() as stack:
            try:
                holder = stack.enter_context(run.lock(note=say))
            except RunError:
                if gathering.leads is None and (there := run.holder()) is not None and _is_open(run, there):
                    break
                if gathering.leads is not None or time.monotonic() - began > TOUCH_S:
                    raise
                time.sleep(LOOK_S)
                continue
            run.nodes.mkdir(exist_ok=True)
            write_json(run.nodes / OPEN, dataclasses.asdict(holder))
            leader = Leader(run, gathering, num_nodes - 1, digest, holder, say)
            try:
                yield leader
            except BaseException as error:
                leader.dismiss(*_said(error))
                raise
            finally:
                leader.forget()
            return
    follower = Follower(run, digest, gathering)
    try:
        yield follower
    finally:
        follower.leave()


def _said(error: BaseException) -> tuple[int, str]:
    """With what exit code, and what to say, all are to end for it."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, "the node that leads was told to end"
    return error.exit_code if isinstance(error, DtrainError) else 3, str(error)


def _is_namesake(said: dict[str, Any]) -> bool:
    """Whether another machine than this one has said so, under this one's name."""
    return said.get("host") == host_name() and said.get("network", network()) != network()


def _is_open(run: RunDir, holder: Holder) -> bool:
    """Whether the machine that holds the run waits for others, or would take them in. A word that one left which was
    killed is not of this holder's.
    """
    return read_json(run.nodes / OPEN) == dataclasses.asdict(holder)


def _is_told(folder: Path) -> bool:
    """Whether the machine that has this folder has had a leader's word."""
    return any(read_json(folder / word) is not None for word in (GO, OVER))


def _folders(run: RunDir) -> Sequence[Path]:
    return sorted(path.parent for path in run.nodes.glob(f"*/{HERE}"))


def _tell(path: Path, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # one that has ended has taken its folder with it
        replace_json(path, what)
