"""The processes of several machines, where the same command is typed on each or started there by something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.spec import Command, Gathering, LauncherSpec, Meeting, Restarts, spec
from dtrain.launchers._here import one_node, one_of_nodes, procs_here
from dtrain.launchers._network import HOST, is_here
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology


@spec
class Torchrun(LauncherSpec):
    nodes: Annotated[int, Field(ge=1)] = 2
    """Machines; `dtrain launch` is to be typed on each of them, in the same words."""
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes on each: one per visible GPU; on CPU two where there are two cores."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""
    host: str = "auto"
    """The machine that leads, by a name or address that the others reach it by; `auto` is the first one to start."""
    port: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    """Where the machines meet, on the one that leads; `auto` is a free port."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the machines wait for each other before the ranks are started."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often in a row a run that failed is started again, from its newest checkpoint: never for what the user typed,
    nor without progress."""
    restart_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """Before the first of those starts; doubled each time, up to ten minutes."""

    def problems(self) -> list[str]:
        if self.host == "auto" or HOST.fullmatch(self.host):
            return []
        return [f"launcher.host={self.host}: neither the name nor the address of a machine"]

    def topology(self, device: Device, machine: Machine) -> Topology:
        return Topology(nodes=self.nodes, procs_per_node=procs_here(self.procs, device, machine))

    def gathering(self) -> Gathering:
        if self.host == "auto":
            return Gathering(port=None if self.port == "auto" else self.port, timeout_s=self.join_timeout_s)
        return Gathering(leads=is_here(self.host), host=self.host, port=None if self.port == "auto" else self.port,
                         timeout_s=self.join_timeout_s)  # fmt: skip

    def restarts(self) -> Restarts:
        return Restarts(self.max_restarts, self.restart_wait_s)

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        if meeting is None:
            return one_node(worker, topology.procs_per_node, self.threads)
        return one_of_nodes(worker, topology.nodes, topology.procs_per_node, self.threads, meeting)
