"""Machines that leave and come while a run goes on: launchers of one machine, that share a folder, killed and started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.launchers.muster import OPEN
from dtrain.runs import RunDir
from tests import measured
from tests.cluster.machines import Machines
from tests.e2e.command import SMALL, kill_together, rows, workers_of
from tests.faults.harness import rows_of

STEPS = 60
ALONE = [*SMALL, "dataset.path=texts.jsonl", "strategy=ddp", f"train.steps={STEPS}", "eval.every_steps=0", "eval.fraction=0",
         "tracker=jsonl", "tracker.jsonl.plot=false", "checkpoint.every_minutes=null", "checkpoint.every_steps=4",
         "checkpoint.async=false"]  # fmt: skip
TYPED = [
    *ALONE,
    "launcher=torchrun",
    "launcher.nodes=1:2",
    "launcher.procs=1",
    "launcher.last_call_s=2",
    "run.name=elastic",
]
SLOWLY = {"DTRAIN_FAIL": ",".join(f"train.forward:sleep={how}:rank={rank}" for rank in range(2)
                                  for how in ("2:attempt=0:after=6", "0.5:attempt=1"))}  # fmt: skip
"""So that the seventh step is still on its way when a machine is lost, and something is left to do when another one has
come.
"""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    for one in made.started:
        one.kill()
        one.wait()


def until(true: Callable[[], bool], machines: Machines, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, [machines.said(i) for i in range(len(machines.started))]
        time.sleep(0.05)


def trained(run: RunDir, attempt: int) -> int:
    """Steps that rank 0 has begun in it."""
    taken = rows_of(run, attempt)
    return len(taken[0]) if taken else 0


WHO = ["machine", *(["launcher", "launcher that leads"] if os.environ.get("DTRAIN_FAULTS") == "all" else [])]
"""What is killed; `make faults` has all."""


ENDED = {"machine": "lost", "launcher": "stopped", "launcher that leads": None}


@pytest.mark.slow
@pytest.mark.parametrize("who", WHO)
def test_a_run_goes_on_with_whoever_is_there(machines: Machines, who: str) -> None:
    run, alone = RunDir(machines.folder / "runs" / "elastic"), RunDir(machines.folder / "runs" / "alone")
    first = machines.start(*TYPED, **SLOWLY)
    until((run.nodes / OPEN).exists, machines)
    first.send_signal(signal.SIGSTOP)  # else it begins alone where the second takes long to start
    second = machines.start(*TYPED, **SLOWLY)
    until(lambda: any(run.nodes.glob("*/here.json")), machines)
    first.send_signal(signal.SIGCONT)
    whole = machines.start(*ALONE, "launcher.procs=1", "run.name=alone")
    until(lambda: trained(run, 0) >= 7, machines)
    killed_at = time.monotonic()
    killed, left = (first, second) if who == "launcher that leads" else (second, first)
    if who == "machine":
        kill_together([killed.pid, *(one.pid for one in psutil.Process(killed.pid).children(recursive=True))])
    else:  # its ranks notice, save and end
        killed.send_signal(signal.SIGKILL)
    until(lambda: trained(run, 1) >= 2, machines)
    third = machines.start(*TYPED, **SLOWLY)
    assert [one.wait(120) for one in (left, third, whole)] == [0, 0, 0], [machines.said(i) for i in range(4)]

    attempts = run.read_manifest()["attempts"]
    assert [one["size"] for one in attempts] == [2, 1, 2]
    assert [one.get("ended") for one in attempts] == [ENDED[who], "stopped", "done"]
    said = machines.said(machines.started.index(left))
    again = re.search(r"resume: \d steps? after step \d+ had not been saved, [\d.]+ s of training: done again", said)
    assert (again is not None) == (who == "machine"), said
    if who != "launcher that leads":
        assert re.search(r"node 1 on \S+ is gone.*: all meet anew, at least 1", said), said
    assert "launcher.nodes: 1 of up to 2 machines; batch: global 8 = 8 on 1 rank" in said
    assert "another machine has come: saved at step" in said
    lost = [event["lost_steps"] for event in rows(run.events) if event["kind"] == "launched"]
    measured.lost(max(lost))
    measured.detected(next(event["monotonic"] for event in rows(run.events) if event["kind"] == "ended") - killed_at)
    assert lost[0] == lost[2] == 0  # for one that comes, the others save first
    assert 0 < lost[1] < 4 if who == "machine" else lost[1] == 0

    here, there = rows(run.metrics), rows(alone.metrics)
    assert [(row["step"], row["samples"], row["lr"]) for row in here] == [
        (row["step"], row["samples"], row["lr"]) for row in there
    ]
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], abs=1e-5)
    expected = dict(rows_of(alone, 0)[0])
    for attempt, size in enumerate((2, 1, 2)):
        taken = rows_of(run, attempt)
        assert len(taken) == size
        for ranks in zip(*taken, strict=False):  # one that is killed may be a step behind
            assert len({place for place, _ in ranks}) == 1
            assert [one for _, ids in ranks for one in ids] == expected[ranks[0][0]]
    assert workers_of(run.path) == []
    assert len(list(run.nodes.glob("*"))) <= 1  # of the one that was killed; a start that lasts longer removes it


NAMES = [f"dtrain-{os.getpid()}-{number}" for number in (1, 2)]


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def namesakes() -> Iterator[list[list[str]]]:
    """What a command is started by in two places with one host name, each with a network and pids of its own."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or ip("netns", "add", NAMES[0]):
        pytest.skip("networks of their own need root, and `ip` and `unshare`: apt-get install iproute2 util-linux")
    try:
        made = [
            ip("netns", "add", NAMES[1]),
            ip("link", "add", "dt1", "netns", NAMES[0], "type", "veth", "peer", "name", "dt2", "netns", NAMES[1]),
        ]
        for number, name in enumerate(NAMES, 1):
            made += [
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"dt{number}"),
                ip("-n", name, "link", "set", f"dt{number}", "up"),
                ip("-n", name, "link", "set", "lo", "up"),
            ]
        assert not any(made)
        yield [["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
               for name in NAMES]  # fmt: skip
    finally:
        for name in NAMES:
            ip("netns", "del", name)


@pytest.mark.slow
def test_machines_of_one_name_meet_where_the_leaders_address_is_said(
    machines: Machines, namesakes: list[list[str]]
) -> None:
    typed = [*TYPED, "train.steps=12", "schedule=constant", "launcher.last_call_s=60", "launcher.host=10.77.0.1"]
    both = [machines.start(*typed, inside=inside) for inside in namesakes]
    assert [one.wait(120) for one in both] == [0, 0], [machines.said(i) for i in range(2)]
    assert "node 1; 10.77.0.1 leads" in machines.said(1)
    run = RunDir(machines.folder / "runs" / "elastic")
    assert [one["size"] for one in run.read_manifest()["attempts"]] == [2]
    assert list(run.nodes.glob("*")) == []


def test_what_cannot_be_is_refused_before_a_rank_is_started(machines: Machines) -> None:
    said = machines.start(*ALONE, "launcher=torchrun", "launcher.nodes=3:2")
    assert said.wait(120) == 2
    assert "launcher.nodes=3:2: at least 3 and at most 2; type 2:3" in machines.said(0)
