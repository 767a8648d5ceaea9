"""What the doctor says of a disk, of packages, of children that crash; no torch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dtrain import cli
from dtrain.doctor import checks, nodes
from dtrain.doctor._children import Said, ask, ask_all
from dtrain.doctor.checks import Place
from dtrain.doctor.finding import Finding
from dtrain.doctor.nodes import Member
from dtrain.plan.machine import Machine

CPU = Machine(cores=2, memory_bytes=8 << 30, gpus=0, gpu_name="", gpu_memory_bytes=0)
GPUS = Machine(cores=64, memory_bytes=8 << 30, gpus=8, gpu_name="NVIDIA H100", gpu_memory_bytes=80 << 30)


def found(check: str, folder: Path, machine: Machine = CPU) -> dict[str, Finding]:
    return {one.name: one for one in checks.CHECKS[check](Place(folder, 2, machine))}


def test_a_disk_that_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "WRITE_BYTES", 8 << 20)
    one = found("disk", tmp_path / "not" / "there")
    assert list(one) == ["space", "speed", "locks"]
    assert one["locks"].state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_full_one_a_slow_one_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(checks, "SLOW_MB_S", 1e9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    one = found("disk", tmp_path)
    assert (one["space"].state, one["speed"].state) == ("fail", "warn")
    assert "84 GB" in one["speed"].advice
    (tmp_path / "file").touch()
    assert found("disk", tmp_path / "file" / "runs")["space"].state == "fail"
    monkeypatch.setattr("tempfile.mkdtemp", _refuse)
    assert found("disk", tmp_path)["disk"].line().startswith("fail  disk       ")


def _refuse(*args: object, **named: object) -> str:
    raise PermissionError(13, "Permission denied")


def test_versions_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("versions", tmp_path)["versions"].state == "ok"
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99", "no-such-package", "pytest; extra == 'dev'"])
    one = found("versions", tmp_path)["versions"]
    assert one.state == "fail"
    assert f"numpy {metadata.version('numpy')} is not >=99; no-such-package is not installed" == one.text


@pytest.mark.parametrize(("said", "machine", "state", "told"), [
    ({"gpus": 0, "gloo": True, "nccl": False}, CPU, "warn", "no GPU"),
    ({"gpus": 0, "gloo": True, "nccl": False}, GPUS, "fail", "8 x NVIDIA H100 here, and torch sees none"),
    ({"gpus": 8, "gloo": True, "nccl": False, "bf16": True, "cuda": "12.8"}, GPUS, "fail", "torch has no NCCL"),
    ({"gpus": 8, "gloo": True, "nccl": True, "bf16": True, "cuda": "12.8"}, GPUS, "ok", "80 GiB"),
    ({"gpus": 8, "gloo": True, "nccl": True, "bf16": False, "cuda": "12.8"}, GPUS, "ok", "no bf16"),
])  # fmt: skip
def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, object], machine: Machine,
                 state: str, told: str) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "ask", lambda argv: Said({"torch": "2.13.0", **said}))
    one = found("devices", tmp_path, machine)["devices"]
    assert one.state == state
    assert told in one.text


def test_a_kernel_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of flash-attn, a package whose import is a crash or an error of the linker."""
    monkeypatch.setattr(checks, "_installed", lambda package: package in ("flash-attn", "bitsandbytes"))
    monkeypatch.setattr(checks, "ask", lambda argv: ask(["tests.unit.doctor.crashes", argv[1]]))
    one = found("kernels", tmp_path)
    assert one["flash-attn"] == Finding("flash-attn", "fail", "killed by SIGSEGV", one["flash-attn"].advice)
    assert one["bitsandbytes"].text.endswith("undefined symbol: _ZN3c105ErrorC2E")
    assert "was built for another torch" in one["bitsandbytes"].advice
    assert (one["attention"].state, one["deepspeed"].state) == ("ok", "ok")
    assert one["optional"].text.endswith(": liger-kernel")


def test_a_child_that_hangs_is_left_behind_dead() -> None:
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    (one,) = ask_all([["tests.unit.doctor.crashes", "hangs"]], [env], timeout_s=1.0)
    assert one == (None, "no answer within 1 s", "")


def _ranks(monkeypatch: pytest.MonkeyPatch, took: list[float]) -> Finding:
    value = {"gb_per_s": 2.0, "backend": "gloo", "compute_ms": took}
    monkeypatch.setattr(checks, "ask_all", lambda argvs, envs, timeout_s: [Said(value)] * len(argvs))
    return checks.between([("127.0.0.1", rank, rank) for rank in range(len(took))], len(took), 1)


def test_a_rank_that_is_slower_than_the_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ranks(monkeypatch, [5.0, 5.1, 4.9, 5.2]).state == "ok"
    one = _ranks(monkeypatch, [5.0, 5.1, 12.0, 5.2])
    assert (one.state, "rank 2 takes 12.0 ms" in one.text) == ("warn", True)
    monkeypatch.setattr(checks, "ask_all", lambda argvs, envs, timeout_s: [Said(None, "Connection refused")] * 2)
    assert (
        checks.between([("h", 0, 0), ("h", 1, 1)], 2, 1).line().startswith("fail  ranks        rank 0 of 2: Connection")
    )


def test_clocks_that_differ() -> None:
    members = [Member(f"n{i}", "t", 1, 1, ahead) for i, ahead in enumerate([0.1, 0.3, 64.0])]
    assert nodes._clocks(members[:2]).state == "ok"
    one = nodes._clocks(members)
    assert (one.state, one.text) == ("warn", "n2 is +63.7 s off")


def test_one_machine_of_three_is_named(tmp_path: Path) -> None:
    team = nodes.meeting(3, tmp_path)
    one, *more = nodes.found_with_others(team, Place(tmp_path, 1, CPU), come_s=0.5)
    assert more == []
    assert one.state == "fail"
    assert one.text.startswith("1 of 3 machines came within 0 s: ")
    assert list(tmp_path.iterdir()) == []
    assert nodes.meeting(None, tmp_path) is None
    (tmp_path / "file").touch()
    (one,) = nodes.found_with_others(nodes.meeting(2, tmp_path / "file"), Place(tmp_path, 1, CPU))
    assert (one.state, "cannot be made" in one.text) == ("fail", True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "WRITE_BYTES", 1 << 20)
    typed = ["doctor", "--dir", str(tmp_path), "--only", "versions,disk,limits", "--json"]
    assert cli.run(typed) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in lines] == ["versions", "space", "speed", "locks", "limits"]
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99"])
    assert cli.run(["doctor", "--only", "versions"]) == 1
    assert cli.run(["doctor", "--only", "disks"]) == 2
    assert cli.run(["doctor", "--procs", "0"]) == 2
    assert cli.run(["doctor", "--nodes", "0"]) == 2
