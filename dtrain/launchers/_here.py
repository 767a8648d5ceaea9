"""What a launcher starts on the machine that it runs on."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Literal

from dtrain.config.spec import Command, Meeting
from dtrain.errors import PlanError
from dtrain.plan.machine import Machine, num_cores
from dtrain.plan.world import Device, Topology


def procs_here(procs: int | Literal["auto"], device: Device, machine: Machine) -> int:
    """Processes on this machine: one per visible GPU; on CPU two where there are two cores. Raises PlanError."""
    if device == "cpu":
        most = 2 if machine.cores >= 2 else 1
        return most if procs == "auto" else procs
    if machine.gpus == 0:
        raise PlanError("device: cuda, but no GPU is visible here; set device=cpu, or look at nvidia-smi and "
                        "CUDA_VISIBLE_DEVICES")  # fmt: skip
    if procs != "auto" and procs > machine.gpus:
        raise PlanError(f"launcher.procs: {procs} processes need a GPU each and {machine.gpus} are visible; "
                        f"set launcher.procs={machine.gpus} or auto")  # fmt: skip
    return machine.gpus if procs == "auto" else procs


def machine_there(here: Machine, gpus: int) -> Machine:
    """A machine of a job that is handed over, of which only its GPUs are known, and `here` where it is typed."""
    known = bool(here.gpus and gpus)
    return dataclasses.replace(here, gpus=gpus, gpu_name=here.gpu_name if known else "",
                               gpu_memory_bytes=here.gpu_memory_bytes if known else 0)  # fmt: skip


def procs_there(procs: int | Literal["auto"], gpus: int, device: Device) -> int:
    """Processes on a machine of a job: one per GPU; on CPU one. Raises PlanError."""
    procs = procs if procs != "auto" else gpus if device == "cuda" else 1
    if procs == 0:
        raise PlanError("launcher.gpus_per_node=0: device=cuda needs GPUs; say how many each node has")
    return procs


def ranks(worker: Sequence[str], topology: Topology, threads: int | Literal["auto"],
          meeting: Meeting | None) -> Command:  # fmt: skip
    """The ranks of this machine: all of the run, or, where machines have met, its part."""
    if meeting is None:
        return _one_node(worker, topology.procs_per_node, threads)
    return _one_of_nodes(worker, topology, threads, meeting)


def _one_node(worker: Sequence[str], procs: int, threads: int | Literal["auto"]) -> Command:
    if procs == 1:  # torchrun would cost seconds and add nothing
        return Command([sys.executable, "-u", "-m", "dtrain", *worker], {**_env(procs, threads), **_alone()})
    rendezvous = [
        "--standalone",                # a rendezvous on a free port of this machine
        "--local-addr=127.0.0.1",      # this machine's own name may not resolve
    ]  # fmt: skip
    return Command(_torchrun(rendezvous, procs, worker), _env(procs, threads))


def _one_of_nodes(worker: Sequence[str], topology: Topology, threads: int | Literal["auto"],
                  meeting: Meeting) -> Command:  # fmt: skip
    host = f"[{meeting.host}]" if ":" in meeting.host else meeting.host
    rendezvous = [
        f"--nnodes={topology.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{meeting.port}",
        f"--rdzv-id={meeting.id}",
        f"--rdzv-conf=is_host={int(meeting.is_host)}",   # torchrun would guess it from the names of this machine
        f"--local-addr={meeting.local}",                 # what the ranks of other nodes reach this one by
    ]  # fmt: skip
    env = _env(topology.procs_per_node, threads)
    if meeting.interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        env["GLOO_SOCKET_IFNAME"] = meeting.interface
    return Command(_torchrun(rendezvous, topology.procs_per_node, worker), env)


def _torchrun(rendezvous: Sequence[str], procs: int, worker: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={procs}",
        "--max-restarts=0",            # a restart is a new attempt, and the launch verb's to decide
        "--monitor-interval=0.1",
        "-m", "dtrain", *worker,
    ]  # fmt: skip


def _env(procs: int, threads: int | Literal["auto"]) -> dict[str, str]:
    env = {"PYTHONFAULTHANDLER": "1"}
    if threads != "auto":
        env["OMP_NUM_THREADS"] = str(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, num_cores() // procs))
    return env


def _alone() -> dict[str, str]:
    """What torchrun would set for the only process. Nobody has to find it: its store takes any port when it opens."""
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0"}  # fmt: skip
