"""What is said of nodes by what each of them found."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from dtrain import cli
from dtrain.doctor.finding import Finding
from dtrain.launchers.slurm import Slurm
from dtrain.verbs._doctor_nodes import read, summary

GOOD = (Finding("versions", "ok", "dtrain 1, torch 2"), Finding("limits", "ok", "1024 open files"),
        Finding("speed", "ok", "writes 900 MB/s", figures={"writes, MB/s": 900.0}), Finding("nodes", "ok", "a, b, c see one nfs"))  # fmt: skip


def said(**other: dict[str, Finding]) -> dict[str, Finding]:
    """Of three nodes, but for what is `other` on one, by its name."""
    by_node = {node: [other.get(node, {}).get(one.name, one) for one in GOOD] for node in ("a", "b", "c")}
    return {one.name: one for one in summary(by_node)}


def test_a_line_of_each_node_and_what_they_found_together() -> None:
    found = said()
    assert list(found) == ["a", "b", "c", "nodes"]
    assert {one.state for one in found.values()} == {"ok"}
    assert found["a"].text == "versions, limits, speed"


def test_the_sick_node_is_named_with_what_to_do() -> None:
    found = said(b={"limits": Finding("limits", "fail", "no", "do")})
    assert [one.state for one in found.values()] == ["ok", "fail", "ok", "ok"]
    assert found["b"].text == "limits: no (do)"


def test_a_node_is_slow_by_the_others() -> None:
    found = said(c={"speed": Finding("speed", "ok", "writes 300 MB/s", figures={"writes, MB/s": 300.0})})
    assert (found["a"].state, found["c"].state) == ("ok", "warn")
    assert found["c"].text == "slow: speed: writes, MB/s 300, others 900"


def test_a_node_with_other_packages_is_named() -> None:
    found = said(a={"versions": Finding("versions", "ok", "dtrain 1, torch 1")})
    assert (found["a"].state, found["b"].state) == ("warn", "ok")
    assert found["a"].text == "versions: dtrain 1, torch 1, and most have dtrain 1, torch 2"
    two = {node: [Finding("torch", "ok", node)] for node in ("a", "b")}
    assert [one.state for one in summary(two)] == ["warn", "warn"], "nobody knows which is right"


def test_what_is_no_finding_is_passed_over() -> None:
    line = json.dumps({"node": "n1", **dataclasses.asdict(GOOD[0])})
    assert read(["module loaded", "{}", "[1]", '{"node": "n1", "x": 1}', line]) == {"n1": [GOOD[0]]}


def test_how_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    argv = list(
        Slurm(nodes=4, gpus_per_node=8, partition="p", container="a b.sif", mounts=("/d",)).everywhere(["doctor"])
    )
    assert argv[:2] == ["srun", "--nodes=4"]
    assert "--gpus-per-node=8" in argv
    assert argv[argv.index("apptainer") :] == ["apptainer", "exec", "--nv", "--bind", "/d", "a b.sif", "python3", "-u", "-m", "dtrain", "doctor"]  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert "--nodes=3" in Slurm().everywhere(["doctor"]), "all of the allocation that there is"


@pytest.mark.parametrize(("typed", "says"), [
    (["--launcher", "local"], "starts no doctor on other machines"), (["launcher.nodes=2"], "name it too"),
    (["--launcher", "deepspeed"], "say where the list of machines is"),
    (["--launcher", "deepspeed", "launcher.by=hand", "launcher.hostfile=x"], "type `dtrain doctor --nodes N` on each"),
    (["--launcher", "slurm", "train.steps=3"], "not a key of the launcher"), (["--launcher", "slrm"], "slurm"),
])  # fmt: skip
def test_what_cannot_be_is_refused(typed: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", *typed]) == 2
    assert says in capsys.readouterr().err
