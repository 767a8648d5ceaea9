"""Two machines of a hostfile, reached by a real ssh."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.runs import RunDir
from tests.cluster.slurm import until
from tests.cluster.ssh import HOSTS, missing, sshd
from tests.e2e.command import ROOT, SMALL, dtrain, workers_of, write_texts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

STEPS = 60
TYPED = [*SMALL, "dataset.path=texts.jsonl", "strategy=ddp", "eval.every_steps=0", f"train.steps={STEPS}"]
SECRET = "s3cr3t-and-never-written"


@pytest.fixture(scope="module")
def reach(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with sshd(tmp_path_factory.mktemp("ssh") / "conf") as typed:
        yield [*typed, "launcher=deepspeed", "launcher.hostfile=hosts", "launcher.join_timeout_s=60"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / 'a b\'s "100%h" $(touch x);'
    made.mkdir()
    write_texts(made / "texts.jsonl")
    (made / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return made


class Head:
    """The command, where it is typed."""

    def __init__(self, folder: Path, typed: list[str], env: dict[str, str]) -> None:
        self.out = folder / f"out-{len(list(folder.glob('out-*')))}"
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dtrain", "launch", *typed], cwd=folder, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
            )  # fmt: skip

    def __enter__(self) -> Head:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def trains(self, run: RunDir) -> None:
        """Until it has trained a further step."""

        def there() -> bool:
            assert self.process.poll() is None, self.out.read_text()
            return len(rows(run)) > began

        began = len(rows(run))
        until(there, 120, self.out.read_text)


def rows(run: RunDir) -> list[dict[str, float]]:
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def ended(run: RunDir, attempt: int) -> str:
    """How it did; nothing of it is left."""
    until(lambda: run.read_outcome(attempt) is not None and not workers_of(run.path) and run.holder() is None, 120)
    return str(run.read_outcome(attempt).kind)


def test_they_train_as_one_whatever_becomes_of_the_machine_that_calls(folder: Path, reach: list[str]) -> None:
    hostile = {"HF_X": '; touch y; $(touch y) "\n`touch y` %h \'', "A_TOKEN": SECRET,
               "DTRAIN_FAIL": "train.forward:sleep=0.5:attempt=0,train.forward:sleep=0.5:attempt=1"}  # fmt: skip
    run = RunDir(folder / "runs" / "a b")
    typed = [*TYPED, *reach, "run.name=a b"]
    with Head(folder, [*typed, "launcher.by=pdsh"], hostile) as head:
        head.trains(run)
        head.process.kill()
        assert ended(run, 0) == "stopped"
        assert "without A_TOKEN" in head.out.read_text()
    with Head(folder, typed, hostile) as head:
        head.trains(run)
        assert SECRET not in "".join(word for one in psutil.process_iter() for word in _argv(one))
        assert _environments(run) == {(SECRET, hostile["HF_X"])}
        head.process.send_signal(signal.SIGTERM)
        assert head.process.wait(120) == 75, head.out.read_text()
        assert ended(run, 1) == "stopped"
    done = dtrain(folder, "launch", *typed, env=hostile)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{HOSTS[0]}: done:" in done.stdout
    (left,) = (
        one for one in run.nodes.iterdir() if one.is_dir()
    )  # of the one that was killed; an hour later the next one removes it
    assert left.name.startswith("head-")
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    alone = dtrain(folder, "launch", *TYPED, "launcher.procs=2", "run.name=alone")
    assert alone.returncode == 0, alone.stderr
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(RunDir(folder / "runs" / "alone"))]
    assert {path.name for path in folder.iterdir()} == {"hosts", "out-0", "out-1", "runs", "texts.jsonl"}
    written = [path for path in run.path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == []


def _argv(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environments(run: RunDir) -> set[tuple[str | None, str | None]]:
    """Of the ranks."""
    found = set()
    for pid in workers_of(run.path):
        env = psutil.Process(pid).environ()
        found.add((env.get("A_TOKEN"), env.get("HF_X")))
    return found


@pytest.mark.parametrize("by", ["ssh", "pdsh"])
def test_machines_that_are_down_are_named(folder: Path, reach: list[str], by: str) -> None:
    port = int(next(word for word in reach if "ssh_port" in word).partition("=")[2])
    there = ["127.0.0.2"] if by == "ssh" else []
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in [*there, "127.0.0.4", "127.0.0.5"]))
    with socket.create_server(("127.0.0.5", port)):  # takes a connection, and never says a word
        typed = [*TYPED, *reach, f"launcher.by={by}", "launcher.connect_timeout_s=2"]
        done = dtrain(folder, "launch", *typed, timeout_s=120)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [re.sub(r" port \d+", "", line) for line in errors] == [
        "error: 127.0.0.4: could not be started: ssh: connect to host 127.0.0.4: Connection refused",
        "error: 127.0.0.5: could not be started: Connection to 127.0.0.5 timed out",
    ]
    assert workers_of(folder / "runs" / "demo") == []


def doctor(folder: Path, reach: list[str], *typed: str) -> tuple[int, list[str]]:
    done = dtrain(folder, "doctor", "--launcher", "deepspeed", "--only", "versions,limits,ranks", *reach[:2], *typed,
                  "launcher.hostfile=hosts", timeout_s=120)  # fmt: skip
    assert done.stderr == ""
    assert not (folder / "runs").is_dir() or list((folder / "runs").iterdir()) == []
    return done.returncode, done.stdout.splitlines()


def test_the_doctor_looks_at_each_and_at_all_together(folder: Path, reach: list[str]) -> None:
    code, lines = doctor(folder, reach)
    assert code == 0, lines
    assert [line.split()[:2] for line in lines] == [["ok", one] for one in (*HOSTS, "nodes", "clocks", "ranks")], lines
    assert f"{', '.join(HOSTS)} see one " in lines[2]
    assert "2 processes sum up" in lines[4]


@pytest.mark.parametrize("by", ["ssh", "pdsh"])
def test_the_doctor_names_all_that_cannot_be_reached(folder: Path, reach: list[str], by: str) -> None:
    hosts = [HOSTS[0], "127.0.0.4", "127.0.0.5"]
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    port = int(next(word for word in reach if "ssh_port" in word).partition("=")[2])
    with socket.create_server(("127.0.0.5", port)):  # takes a connection, and never says a word
        code, lines = doctor(folder, reach, f"launcher.by={by}", "launcher.connect_timeout_s=2")
    assert code == 1
    assert [line.split()[:2] for line in lines] == [
        ["ok", hosts[0]], ["fail", hosts[1]], ["fail", hosts[2]], ["fail", "ranks"]]  # fmt: skip
    assert "call: ssh: connect to host 127.0.0.4 port" in lines[1]
    assert "Connection refused (look at it by hand" in lines[1]
    assert "timed out" in lines[2]
    assert "not measured without 127.0.0.4, 127.0.0.5" in lines[3]


def test_a_rank_that_is_killed_is_named_with_its_machine(folder: Path, reach: list[str]) -> None:
    done = dtrain(folder, "launch", *TYPED, *reach, env={"DTRAIN_FAIL": "train.forward:kill:rank=1:after=3"})
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"rank 1 on 127\.0\.0\.[23].*killed by SIGKILL", done.stderr), done.stderr
    assert ended(RunDir(folder / "runs" / "demo"), 0) == "worker"
