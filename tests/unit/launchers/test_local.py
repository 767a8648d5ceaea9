from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dtrain.config.spec import Command
from dtrain.errors import PlanError
from dtrain.launchers.local import Local
from dtrain.plan.machine import Machine, num_cores
from dtrain.plan.world import Topology, World


def machine(cores: int = 8, gpus: int = 0) -> Machine:
    return Machine(cores=cores, memory_bytes=2**33, gpus=gpus, gpu_name="H100" if gpus else "", gpu_memory_bytes=0)


@pytest.mark.parametrize(("device", "cores", "gpus", "procs"), [("cpu", 8, 4, 2), ("cpu", 1, 0, 1), ("cuda", 1, 4, 4)])
def test_auto_counts_what_there_is(device: str, cores: int, gpus: int, procs: int) -> None:
    assert Local().topology(device, machine(cores, gpus)) == Topology(nodes=1, procs_per_node=procs)


def test_a_number_is_taken_or_refused() -> None:
    assert Local(procs=3).topology("cpu", machine(1)).size == 3
    assert Local(procs=2).topology("cuda", machine(gpus=4)).size == 2
    with pytest.raises(PlanError, match=r"launcher.procs: 8 processes .* 4 are visible; set launcher.procs=4"):
        Local(procs=8).topology("cuda", machine(gpus=4))
    with pytest.raises(PlanError, match="no GPU is visible"):
        Local().topology("cuda", machine())


@pytest.mark.parametrize("bad", [{"procs": 0}, {"procs": "many"}, {"threads": -1}, {"proc": 1}])
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"proc|threads"):
        Local(**bad)


def build(procs: int, **values: object) -> Command:
    return Local(**values).command(Path("/r"), ["worker", "--run-dir", "/a b/c'd\""], Topology(1, procs))


def test_argv_is_a_list_that_needs_no_quotes() -> None:
    argv = list(build(2).argv)
    assert argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert argv[-5:] == ["-m", "dtrain", "worker", "--run-dir", "/a b/c'd\""]
    assert {"--nproc-per-node=2", "--max-restarts=0", "--standalone"} <= set(argv)


def test_one_process_gets_the_environment_of_a_rank() -> None:
    command = build(1)
    assert command.argv[:4] == [sys.executable, "-u", "-m", "dtrain"]
    assert World.from_env("cpu", command.env) == World(rank=0, size=1, local_rank=0, local_size=1, device="cpu")
    assert command.env["MASTER_PORT"] == "0", "one that is free now may be another's before the rank opens it"


def test_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert num_cores(tmp_path) == min(cores, 2)  # a quota of 1.5
    assert num_cores(tmp_path / "none") == cores
    assert int(build(1).env["OMP_NUM_THREADS"]) == num_cores()
    assert build(2 * cores).env["OMP_NUM_THREADS"] == "1"
    assert build(2, threads=5).env["OMP_NUM_THREADS"] == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in build(2).env
