"""The processes of one machine, started by torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.spec import Command, LauncherSpec, Meeting, Restarts, spec
from dtrain.launchers._here import procs_here, ranks
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology


@spec
class Local(LauncherSpec):
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes: one per visible GPU; on CPU two where there are two cores."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often in a row a run that failed is started again, from its newest checkpoint: never for what the user typed,
    nor without progress."""
    restart_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """Before the first of those starts; doubled each time, up to ten minutes."""

    def topology(self, device: Device, machine: Machine) -> Topology:
        return Topology(nodes=1, procs_per_node=procs_here(self.procs, device, machine))

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        return ranks(worker, topology, self.threads, meeting)

    def restarts(self) -> Restarts:
        return Restarts(self.max_restarts, self.restart_wait_s)
