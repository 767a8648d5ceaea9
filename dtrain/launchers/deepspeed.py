"""The machines of a DeepSpeed hostfile: the command is typed once, and ssh or pdsh has each of them type it too."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.spec import Call, Command, Gathering, LauncherSpec, Meeting, Restarts, spec
from dtrain.errors import ConfigError, PlanError
from dtrain.launchers import _hosts, _orders
from dtrain.launchers._here import ranks
from dtrain.launchers._hosts import Host
from dtrain.launchers._network import HOST, is_here
from dtrain.launchers._orders import HOSTS
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology
from dtrain.runs.host import host_name
from dtrain.runs.secrets import is_secret_variable


@spec
class DeepSpeed(LauncherSpec):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "no_ssh": "launcher.by=hand", "launcher": "launcher.by", "launcher_args": "launcher.ssh_options",
        "master_addr": "launcher.host", "master_port": "launcher.port", "num_nodes": "launcher.include",
        "num_gpus": "launcher.include", "nodes": "launcher.include",
        "procs": "the slots of the hostfile, or launcher.include",
    }  # fmt: skip

    hostfile: str
    """A line for each machine, as `worker-1 slots=8`: so many processes, each with a GPU of its own where it has
    any."""
    include: str = ""
    """Machines to use, as worker-1@worker-2:0,2, the latter with two of its slots; all where it is empty."""
    exclude: str = ""
    """Machines and slots to leave out, in the same words."""
    by: Literal["ssh", "pdsh", "hand"] = "ssh"
    """How the machines are called. With `hand` they are not: the same command is typed on each, or started there by
    something else."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    ssh_options: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    """Options of ssh_config, such as {User: me}; those that have ssh run a command belong in ~/.ssh/config."""
    connect_timeout_s: Annotated[int, Field(ge=1, le=600)] = 10
    """After which a machine that does not answer is down."""
    env: tuple[str, ...] = ()
    """Names of variables that are passed on too; each must be set where the command is typed."""
    python: str | None = None
    """The interpreter of the other machines, where it is not at this one's path."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""
    host: str = "auto"
    """A name or address of the first machine, by which the others reach it."""
    port: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    """Where they meet, on the first machine; `auto` is a free port."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the machines wait for each other before the ranks are started."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often in a row a run that failed is started again, from its newest checkpoint: never for what the user typed,
    nor without progress."""
    restart_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """Before the first of those starts; doubled each time, up to ten minutes."""

    def problems(self) -> list[str]:
        found = _orders.ssh_problems(self.ssh_options, spaced=self.by == "pdsh")
        found += [f"launcher.env: {one!r}: not the name of a variable" for one in self.env if not one.isidentifier()]
        found += [f"launcher.env: {one}: each machine has its own; leave it out" for one in self.env
                  if one in _orders.OWN]  # fmt: skip
        if self.by == "hand":
            found += [f"launcher.{key}: is for machines that are called, and launcher.by=hand calls none; leave it out"
                      for key in ("env", "python", "ssh_options", "ssh_port") if getattr(self, key)]  # fmt: skip
        if self.host != "auto" and not HOST.fullmatch(self.host):
            found.append(f"launcher.host={self.host}: neither the name nor the address of a machine")
        return found

    def _hosts(self) -> list[Host]:
        return _hosts.choose(_hosts.read(Path(self.hostfile)), self.include, self.exclude)

    def _slots(self, hosts: Sequence[Host]) -> int:
        """Of each machine. Raises ConfigError where they differ."""
        counts = {len(host.slots) for host in hosts}
        if len(counts) > 1:
            each = ", ".join(f"{host.name} {len(host.slots)}" for host in hosts)
            raise ConfigError(f"launcher.hostfile={self.hostfile}: every machine is to have the same number of slots, "
                              f"and they have: {each}; take the same of each by launcher.include")  # fmt: skip
        return counts.pop()

    def machine(self, here: Machine) -> Machine:
        if HOSTS in os.environ or self.by == "hand" or not here.gpus:
            return here
        return dataclasses.replace(here, gpus=self._slots(self._hosts()))

    def topology(self, device: Device, machine: Machine) -> Topology:
        if HOSTS in os.environ:
            said = _called()
            return Topology(nodes=said["nodes"], procs_per_node=_fitting(said["procs"], device, machine))
        hosts = self._hosts()
        procs = self._slots(hosts)
        if self.by == "hand":
            if any(not host.whole for host in hosts) and device == "cuda" and machine.gpus != procs:
                raise PlanError("launcher.include: with launcher.by=hand each machine's GPUs are chosen there, by "
                                "CUDA_VISIBLE_DEVICES")  # fmt: skip
            procs = _fitting(procs, device, machine)
        return Topology(nodes=len(hosts), procs_per_node=procs)

    def gathering(self) -> Gathering:
        called = _called() if HOSTS in os.environ else None
        leads = called["index"] == 0 if called else None if self.host == "auto" else is_here(self.host)
        return Gathering(leads=leads, host=None if self.host == "auto" else self.host,
                         port=None if self.port == "auto" else self.port, timeout_s=self.join_timeout_s,
                         start=called["start"] if called else None)  # fmt: skip

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        return ranks(worker, topology, self.threads, meeting)

    def restarts(self) -> Restarts:
        return Restarts(self.max_restarts, self.restart_wait_s)

    def calls(self, launch: Sequence[str], control: Path) -> Sequence[Call]:
        if HOSTS in os.environ or self.by == "hand":
            return ()
        hosts = self._hosts()
        if unset := [one for one in self.env if one not in os.environ]:
            raise ConfigError.of(f"launcher.env: {one}: is not set here, so that there is nothing to pass on; set it "
                                 f"before (export {one}=...), or leave it out" for one in unset)  # fmt: skip
        env = _orders.passed_on(os.environ, self.env, secrets=self.by == "ssh")
        orders = _orders.Orders({host.name: None if host.whole else host.slots for host in hosts}, self._slots(hosts),
                                str(Path.cwd()), list(launch), env, str(control))  # fmt: skip
        told = orders.to_json().encode() + b"\n"
        if len(told) > _orders.MOST_BYTES:
            raise ConfigError(f"launcher.by={self.by}: command and environment are {len(told):,} bytes, too long to be "
                              f"handed on; the largest: {_largest(env)}")  # fmt: skip
        python = self.python or sys.executable
        words = _orders.ssh_words(self.ssh_port, self.ssh_options, self.connect_timeout_s)
        if self.by == "ssh":
            return [Call([host.name], Command(["ssh", "-T", *words, "--", host.name,
                                               _orders.remote_command(python, host.name, "-", env)], {}), told)
                    for host in hosts]  # fmt: skip
        names = [host.name for host in hosts]
        # pdsh reads % itself, and writes the name of the machine where %h stands.
        text = _orders.remote_command(python.replace("%", "%%"), "%h", orders.to_word(),
                                      {name: value.replace("%", "%%") for name, value in env.items()})  # fmt: skip
        argv = ["pdsh", "-R", "ssh", "-S", "-f", str(len(names)), "-t", str(self.connect_timeout_s),
                "-w", ",".join(names), text]  # fmt: skip
        more = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        asked = (*_orders.PASSED, *self.env)
        secret = sorted(name for name in os.environ if is_secret_variable(name)
                        or (name.startswith(asked) and _orders.holds_secret(name, os.environ)))  # fmt: skip
        return [Call(names, Command(argv, {"PDSH_SSH_ARGS_APPEND": f"{more} {' '.join(words)}".strip()}), told,
                     unread=True, named=True, left_out=secret)]  # fmt: skip


def _fitting(procs: int, device: Device, machine: Machine) -> int:
    """Raises PlanError where this machine has too few GPUs for them."""
    if device == "cuda" and machine.gpus < procs:
        raise PlanError(f"launcher.hostfile: {host_name()} has slots={procs}, a GPU for each, and {machine.gpus} are "
                        f"visible there; look at nvidia-smi, or set device=cpu")  # fmt: skip
    return procs


def _called() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(os.environ[HOSTS])
    return said


def _largest(env: Mapping[str, str]) -> str:
    return ", ".join(sorted(env, key=lambda name: -len(env[name]))[:3])
