"""The processes of one machine, started by torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.spec import Command, LauncherSpec, Meeting, spec
from dtrain.launchers._here import one_node, procs_here
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology


@spec
class Local(LauncherSpec):
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes: one per visible GPU; on CPU two where there are two cores."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""

    def topology(self, device: Device, machine: Machine) -> Topology:
        return Topology(nodes=1, procs_per_node=procs_here(self.procs, device, machine))

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        assert meeting is None
        return one_node(worker, topology.procs_per_node, self.threads)
