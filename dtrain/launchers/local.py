"""The processes of one machine, started by torchrun."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.spec import Command, LauncherSpec, spec
from dtrain.errors import PlanError
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology


@spec
class Local(LauncherSpec):
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes: one per visible GPU; on CPU two where there are two cores."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""

    def topology(self, device: Device, machine: Machine) -> Topology:
        if device == "cpu":
            most = 2 if machine.cores >= 2 else 1
            return Topology(nodes=1, procs_per_node=most if self.procs == "auto" else self.procs)
        if machine.gpus == 0:
            raise PlanError("device: cuda, but no GPU is visible here; set device=cpu, or look at nvidia-smi and "
                            "CUDA_VISIBLE_DEVICES")  # fmt: skip
        if self.procs != "auto" and self.procs > machine.gpus:
            raise PlanError(f"launcher.procs: {self.procs} processes need a GPU each and {machine.gpus} are visible; "
                            f"set launcher.procs={machine.gpus} or auto")  # fmt: skip
        return Topology(nodes=1, procs_per_node=machine.gpus if self.procs == "auto" else self.procs)

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology) -> Command:
        procs = topology.procs_per_node
        module = ["-m", "dtrain", *worker]
        if procs == 1:  # torchrun would cost seconds and add nothing
            return Command([sys.executable, "-u", *module], {**self._env(procs), **_alone()})
        torchrun = [
            sys.executable, "-m", "torch.distributed.run",
            "--standalone",                # a rendezvous on a free port of this machine
            "--local-addr=127.0.0.1",      # this machine's own name may not resolve
            f"--nproc-per-node={procs}",
            "--max-restarts=0",            # a restart is a new attempt, and the launch verb's to decide
            "--monitor-interval=0.1",
        ]  # fmt: skip
        return Command([*torchrun, *module], self._env(procs))

    def _env(self, procs: int) -> dict[str, str]:
        env = {"PYTHONFAULTHANDLER": "1"}
        if self.threads != "auto":
            env["OMP_NUM_THREADS"] = str(self.threads)
        elif "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // procs))
        return env


def _alone() -> dict[str, str]:
    """What torchrun would set for the only process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}  # fmt: skip


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
