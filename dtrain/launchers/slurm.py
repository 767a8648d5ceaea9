"""A job of Slurm: a batch script from a template, one task on each node, queued again when its time is over."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dtrain.config.schema import seconds
from dtrain.config.spec import Command, Gathering, Job, LauncherSpec, Meeting, Restarts, spec
from dtrain.errors import ConfigError
from dtrain.launchers._here import machine_there, procs_here, procs_there, ranks
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology
from dtrain.runs.process import BATCH

_VALUE = re.compile(r"[A-Za-z0-9_.,:=+@/%*|&()\[\]!~-]+")
_OPTION = re.compile(rf"--[a-z][a-z0-9-]*(={_VALUE.pattern})?")
_MODULE = re.compile(r"[A-Za-z0-9_.+/@:-]+")
_TIME = re.compile(r"(\d+-)?\d+(:\d\d?){0,2}")


@spec
class Slurm(LauncherSpec):
    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes of the job."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs to ask for on each node; 0 is a job on CPU."""
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes on each node: one per GPU; on CPU one."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""
    time: str | None = None
    """The job's time limit as Slurm writes it; the partition's own when not given. The run saves and ends before it."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    """Memory of a node, such as 500G or 0 for all of it."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """Cores of a node's task, which all its processes share."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as '[--exclusive,"--exclude=n3"]'."""
    signal_s: Annotated[int, Field(ge=1, le=65535)] = 180
    """So many seconds before the time limit, Slurm tells the script to have the run save and end."""
    requeue: bool = True
    """Queue the job again when its time is over, it is preempted or a node fails; it goes on from its newest save."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often a run that failed is queued again: never for what the user typed, nor without progress."""
    array_parallel: Annotated[int, Field(ge=1)] | None = None
    """Of a sweep (-m), which is one job with a task for each run: how many may run at once; all when not given."""
    modules: tuple[str, ...] = ()
    """What `module load` is called with."""
    prolog: tuple[str, ...] = ()
    """Lines of shell before the start, such as [source /opt/site/env.sh]; the one place where shell is typed."""
    container: str | None = None
    """An image to run in."""
    container_by: Literal["apptainer", "pyxis"] = "apptainer"
    mounts: tuple[str, ...] = ()
    """What is seen in the container, as path or path:path."""
    python: str | None = None
    """The interpreter of the job: this one, and in a container python3."""
    template: str | None = None
    """A copy of launch/slurm.sh.j2 that a site has changed."""
    prepare: Literal["submit", "job"] = "submit"
    """Where data and model are fetched and prepared: before the job is queued, so that what is wrong with them is said
    at once and its nodes need no network; or in the job, where a login node is not for such work."""
    port: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = "auto"
    """Where the nodes meet, on the first one; `auto` is a free port."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the nodes wait for each other before the ranks are started."""

    def problems(self) -> list[str]:
        found = [f"launcher.{key}={value!r}: not a value for a line of a batch script; {_ALLOWED}"
                 for key in ("partition", "account", "qos", "constraint", "mem")
                 if (value := getattr(self, key)) is not None and not _VALUE.fullmatch(value)]  # fmt: skip
        found += [f"launcher.options: {one!r}: not an option as --name or --name=value; {_ALLOWED}"
                  for one in self.options if not _OPTION.fullmatch(one)]  # fmt: skip
        found += [f"launcher.modules: {one!r}: not the name of a module"
                  for one in self.modules if not _MODULE.fullmatch(one)]  # fmt: skip
        if any(re.match(r"--array(=|$)", one) for one in self.options):
            found.append("launcher.options: --array is for dtrain to write: -m makes a task for each run, and "
                         "launcher.array_parallel says how many at once")  # fmt: skip
        if self.time is not None and (seconds(self.time) is None or not _TIME.fullmatch(self.time)):
            found.append(f"launcher.time={self.time}: not a time limit; write minutes, as 90, or 01:30:00, or 2-12")
        if self.gpus_per_node and self.procs != "auto" and self.procs > self.gpus_per_node:
            found.append(f"launcher.procs={self.procs}: each needs a GPU, and launcher.gpus_per_node="
                         f"{self.gpus_per_node}; set launcher.procs=auto")  # fmt: skip
        if self.mounts and self.container is None:
            found.append("launcher.mounts: for a container, and launcher.container is not given")
        return found

    def machine(self, here: Machine) -> Machine:
        return here if _on_node(os.environ) else machine_there(here, self.gpus_per_node)

    def topology(self, device: Device, machine: Machine) -> Topology:
        procs = procs_there(self.procs, self.gpus_per_node, device)
        if _on_node(os.environ):
            procs = procs_here(procs, device, machine)
        return Topology(nodes=self.nodes, procs_per_node=procs)

    def gathering(self) -> Gathering:
        # A script of somebody's own may start it more than once: each is a step.
        start = f"{os.environ.get(BATCH)}.{os.environ.get('SLURM_STEP_ID')}"
        return Gathering(leads=os.environ.get("SLURM_NODEID") == "0", timeout_s=self.join_timeout_s,
                         port=None if self.port == "auto" else self.port, start=start)  # fmt: skip

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        return ranks(worker, topology, self.threads, meeting)

    def restarts(self) -> Restarts:
        return Restarts(self.max_restarts)

    def everywhere(self, argv: Sequence[str]) -> Sequence[str]:
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"]) if self._allocated(os.environ) else self.nodes
        asked = [("partition", self.partition), ("account", self.account), ("qos", self.qos), ("time", self.time),
                 ("constraint", self.constraint), ("mem", self.mem), ("gpus-per-node", self.gpus_per_node or None),
                 ("cpus-per-task", self.cpus_per_task)]  # fmt: skip
        inside: list[str] = []
        options = [f"--{key}={value}" for key, value in asked if value is not None]
        if self.container and self.container_by == "pyxis":
            mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
            options += [f"--container-image={self.container}", *mounts]
        elif self.container:
            gpus = ["--nv"] if self.gpus_per_node else []
            inside = ["apptainer", "exec", *gpus, *(word for one in self.mounts for word in ("--bind", one)),
                      self.container]  # fmt: skip
        python = self.python or ("python3" if self.container else sys.executable)
        return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0",
                "--wait=0", *options, *self.options, *inside, python, "-u", "-m", "dtrain", *argv]  # fmt: skip

    def job(self, run_dir: Path, launch: Sequence[str]) -> Job | None:
        if _on_node(os.environ):
            return None
        command = self._typed(launch)
        script = self._script({"run_dir": _told(run_dir), "command": command, "tasks": []})
        return self._job(script, _submit(run_dir.name, f"{run_dir}/job-%j.log"),
                         lambda number: _follow(run_dir, number))  # fmt: skip

    def array(self, runs: Sequence[tuple[Path, Sequence[str]]]) -> Job | None:
        if _on_node(os.environ) or self._allocated(os.environ):
            return None
        tasks = [{"run_dir": _told(run_dir), "command": self._typed(launch)} for run_dir, launch in runs]
        at_once = "" if self.array_parallel is None else f"%{self.array_parallel}"
        parent = runs[0][0].parent
        names = [run_dir.name for run_dir, _ in runs]
        common = os.path.commonprefix(names).rstrip(".=+-")  # noqa: RUF071 - letter by letter is what is meant
        submit = [*_submit(common or "sweep", f"{parent}/job-%A_%a.log"), f"--array=0-{len(runs) - 1}{at_once}"]
        return self._job(self._script({"tasks": tasks}), submit, lambda number: _follow_array(parent, number),
                         task="{job}_{place}")  # fmt: skip

    def of_arrays(self) -> list[str]:
        if self.array_parallel is None or _on_node(os.environ):  # there each task is a run by itself
            return []
        return [f"launcher.array_parallel={self.array_parallel}"]

    def _typed(self, launch: Sequence[str]) -> list[str]:
        return [self.python or ("python3" if self.container else sys.executable), "-u", "-m", "dtrain", *launch]

    def _script(self, values: Mapping[str, Any]) -> str:
        from dtrain.launchers._script import render

        return render(self, self.template, {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "time_s": int(seconds(self.time) or 0) if self.time else 0,
            **values,
        })  # fmt: skip

    def _job(self, script: str, submit: Sequence[str], follow: Callable[[str], Mapping[str, Sequence[str]]],
             task: str = "{job}") -> Job:  # fmt: skip
        return Job(script, submit, follow, task=task, prepare=self.prepare == "submit", now=self._allocated(os.environ))

    def _allocated(self, env: Mapping[str, str]) -> bool:
        """Whether there are nodes already, as salloc gives them. Raises ConfigError where they are too few."""
        if "SLURM_JOB_ID" not in env:
            return False
        there = int(env.get("SLURM_JOB_NUM_NODES", "1"))
        if there < self.nodes:
            raise ConfigError(f"launcher.nodes={self.nodes}: this shell is in job {env['SLURM_JOB_ID']}, with {there}; "
                              f"ask salloc for more, or unset SLURM_JOB_ID to submit a job of its own")  # fmt: skip
        return True


_ALLOWED = "letters, digits and _ . , : = + @ / % * | & ( ) [ ] ! ~ - may stand in one"


def _told(run_dir: Path) -> str:
    where = str(run_dir)
    if "\\" in where or "\n" in where:
        raise ConfigError(f"run.dir: {where!r}: Slurm reads a backslash or the end of a line in the name of a log "
                          f"as something else; choose another folder")  # fmt: skip
    return where


def _submit(name: str, log: str) -> list[str]:
    """`log`: its `%` as Slurm reads them in its last part; those of the folder are meant as they are."""
    folder, _, file = log.rpartition("/")
    return [
        "sbatch", "--parsable",
        "--job-name=" + re.sub(r"[^A-Za-z0-9._=+@,-]", "_", name),
        "--output=" + folder.replace("%", "%%") + "/" + file,
        f"--chdir={Path.cwd()}",
    ]  # fmt: skip


def _follow_array(parent: Path, number: str) -> dict[str, list[str]]:
    return {
        "queue": ["squeue", f"--jobs={number}"],
        "log of the first": ["tail", "-F", str(parent / f"job-{number}_0.log")],
        "runs": ["dtrain", "runs", "ls", str(parent)],
        "save, requeue one": ["scancel", "--signal=USR1", "--batch", f"{number}_0"],
        "save, end all": ["scancel", number],
    }


def _follow(run_dir: Path, number: str) -> dict[str, list[str]]:
    return {
        "queue": ["squeue", f"--jobs={number}"],
        "log": ["tail", "-F", str(run_dir / f"job-{number}.log")],
        "run": ["dtrain", "runs", "show", str(run_dir)],
        "save, requeue": ["scancel", "--signal=USR1", "--batch", number],
        "save, end": ["scancel", number],
    }


def _on_node(env: Mapping[str, str]) -> bool:
    """Whether the batch script's srun has started this process."""
    return BATCH in env and "SLURM_PROCID" in env
