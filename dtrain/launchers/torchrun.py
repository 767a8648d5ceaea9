"""The processes of several machines, where the same command is typed on each or started there by something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.spec import Command, Gathering, LauncherSpec, Meeting, Restarts, spec
from dtrain.launchers._here import procs_here, ranks
from dtrain.launchers._network import HOST, is_here
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology


@spec
class Torchrun(LauncherSpec):
    nodes: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^[1-9]\d{0,5}:[1-9]\d{0,5}$")] = 2
    """Machines; `dtrain launch` is to be typed on each of them, in the same words. MIN:MAX, such as 2:4: the run begins
    with MIN, goes on without those that leave, and takes in those that come, up to MAX."""
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
    last_call_s: Annotated[float, Field(ge=0)] = 30.0
    """Of nodes=MIN:MAX: once MIN are there, how long to wait for a further one."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often in a row a run that failed is started again, from its newest checkpoint: never for what the user typed,
    nor without progress. Of nodes=MIN:MAX, machines that leave or come do not count."""
    restart_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """Before the first of those starts; doubled each time, up to ten minutes."""

    def problems(self) -> list[str]:
        found = []
        if self.host != "auto" and not HOST.fullmatch(self.host):
            found.append(f"launcher.host={self.host}: neither the name nor the address of a machine")
        least, most = self._nodes()
        if least > most:
            found.append(f"launcher.nodes={self.nodes}: at least {least} and at most {most}; type {most}:{least}")
        return found

    def _nodes(self) -> tuple[int, int]:
        """The fewest machines, and the most."""
        if isinstance(self.nodes, int):
            return self.nodes, self.nodes
        least, _, most = self.nodes.partition(":")
        return int(least), int(most)

    def topology(self, device: Device, machine: Machine) -> Topology:
        return Topology(nodes=self._nodes()[1], procs_per_node=procs_here(self.procs, device, machine))

    def gathering(self) -> Gathering:
        least, most = self._nodes()
        return Gathering(
            leads=None if self.host == "auto" else is_here(self.host),
            host=None if self.host == "auto" else self.host,
            port=None if self.port == "auto" else self.port,
            timeout_s=self.join_timeout_s,
            least=least if least < most else None,
            last_call_s=self.last_call_s,
        )

    def restarts(self) -> Restarts:
        least, most = self._nodes()
        return Restarts(self.max_restarts, self.restart_wait_s, counts_lost=least == most)

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        return ranks(worker, topology, self.threads, meeting)
