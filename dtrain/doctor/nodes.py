"""The doctor on several machines: they meet in the folder that runs are to be in, and compare what each has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.doctor.checks import Place, between, file_system
from dtrain.doctor.finding import Finding
from dtrain.runs.files import read_json, write_json
from dtrain.runs.host import free_port, host_name, network

COME_S = 60.0
LOOK_S = 0.2
FRESH_S = 10.0
"""A file that was touched longer ago, by the clock that stamps it, is of an earlier start."""
SKEW_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Team:
    folder: Path
    nodes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    host: str
    """By which it is reached."""
    token: str
    procs: int
    port: int
    ahead_s: float
    """Of the clock that stamps the folder's files."""
    name: str = ""
    """By which it is told of; `host` where it has no other."""
    network: str = ""
    """Tells it from another of the same name."""

    @property
    def called(self) -> str:
        return self.name or self.host


def node_name() -> str:
    """What this machine is called: by Slurm, where it is in a job, by the user's list of hosts, or by itself."""
    return os.environ.get("SLURMD_NODENAME") or host_name()


def meeting(nodes: int | None, folder: Path) -> Team | None:
    """Where the machines meet; None where there is one. A step of Slurm says how many there are."""
    if nodes is None:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    step = "-".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Team(folder / f".doctor{step}", nodes) if nodes > 1 else None


def found_with_others(team: Team, place: Place, come_s: float = COME_S) -> Iterator[Finding]:
    """What the machines together come to; each of them says it."""
    try:
        team.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield Finding("nodes", "fail", f"{team.folder}: cannot be made ({error.strerror})", "name a folder that all "
                      "machines share and can write in: --dir")  # fmt: skip
        return
    token = secrets.token_hex(8)
    mine = team.folder / f"{token}.json"
    mine.touch()
    me = Member(socket.gethostname(), token, place.procs, free_port(), time.time() - mine.stat().st_mtime,
                node_name(), network())  # fmt: skip
    write_json(mine, dataclasses.asdict(me))
    try:
        members = _all(team, mine, come_s)
        hosts = ", ".join(member.called for member in members)
        if len(members) < team.nodes:
            came = f"{len(members)} of {team.nodes} machines came within {come_s:.0f} s: {hosts}"
            yield Finding("nodes", "fail", came, f"the others are down, or do not see {team.folder.parent}")
            return
        if me not in members:
            yield Finding("nodes", "fail", f"more than {team.nodes} came", "one on each machine is enough: "
                          "srun --ntasks-per-node=1")  # fmt: skip
            return
        yield Finding("nodes", "ok", f"{hosts} see one {file_system(team.folder)}")
        yield _clocks(members)
        first = sum(member.procs for member in members[: members.index(me)])
        size = sum(member.procs for member in members)
        meet = "127.0.0.1" if len({(one.host, one.network) for one in members}) == 1 else _reached_by(members[0])
        yield between([(meet, first + local, local) for local in range(me.procs)], size, members[0].port,
                      nodes=[member.called for member in members for _ in range(member.procs)])  # fmt: skip
    finally:
        mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still there
            team.folder.rmdir()


def _all(team: Team, mine: Path, come_s: float) -> list[Member]:
    """Those that have come, in an order that all agree on."""
    deadline = time.monotonic() + come_s
    while True:
        mine.touch()
        now, found = mine.stat().st_mtime, []
        for path in team.folder.glob("*.json"):
            with contextlib.suppress(OSError, TypeError):
                said = read_json(path)
                if said is not None and now - path.stat().st_mtime < FRESH_S:
                    found.append(Member(**said))
        if len(found) >= team.nodes or time.monotonic() > deadline:
            return sorted(found, key=lambda member: (member.host, member.name, member.token))[: team.nodes]
        time.sleep(LOOK_S)


def _reached_by(member: Member) -> str:
    """Its name in a list of hosts, unless that says nothing here, as one of ~/.ssh/config on another machine."""
    try:
        socket.getaddrinfo(member.called, None)
    except OSError:
        return member.host
    return member.called


def _clocks(members: Sequence[Member]) -> Finding:
    ahead = sorted(members, key=lambda member: member.ahead_s)
    skew = ahead[-1].ahead_s - ahead[0].ahead_s
    text = f"within {skew:.1f} s of each other"
    if skew <= SKEW_S:
        return Finding("clocks", "ok", text)
    middle = ahead[len(ahead) // 2].ahead_s
    odd = max(members, key=lambda member: abs(member.ahead_s - middle))
    return Finding("clocks", "warn", f"{odd.called} is {odd.ahead_s - middle:+.1f} s off",
                   "set its clock (chrony, ntp): logs are hard to compare")  # fmt: skip
