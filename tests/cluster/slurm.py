"""A real Slurm of two nodes of one core each, both this machine: its own folder, ports and names; ended with the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
NODES = 2
CONF = """\
ClusterName=dtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A job that is queued again waits until what let it in before is void: two minutes, if not told otherwise.
AuthInfo=cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """While it runs: what to put into the environment."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    ports = free_ports(1 + NODES)
    nodes = [f"NodeName=n{i} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=1 RealMemory=1000"
             for i in range(1, NODES + 1)]  # fmt: skip
    conf.write_text(CONF.format(host=_host(), dir=folder, ports=ports, nodes="\n".join(nodes)))
    env = {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with ExitStack() as stack:
        _munge(stack)
        stack.enter_context(daemon(["slurmctld", "-D", "-f", str(conf)], folder / "slurmctld.out", env))
        for i in range(1, NODES + 1):
            (folder / f"spool-n{i}").mkdir()
            stack.enter_context(daemon(["slurmd", "-D", "-N", f"n{i}", "-f", str(conf)], folder / f"n{i}.out", env))
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        until(lambda: output(idle, env) == str(NODES), 120, lambda: (folder / "slurmctld.log").read_text()[-3000:])
        try:
            yield env
        finally:  # a step lives on where its daemon is ended under it
            subprocess.run(["scancel", "--user=root"], env={**os.environ, **env}, check=False, timeout=20)
            with suppress(AssertionError):
                until(lambda: not output(["squeue", "--noheader"], env), 40)


def output(argv: list[str], env: dict[str, str]) -> str:
    return subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=False,
                          timeout=60).stdout.strip()  # fmt: skip


def until(true: Callable[[], object], within_s: float, tell: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {tell()}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _munge(stack: ExitStack) -> None:
    """The machine's own, or one for this test, which any Slurm here shares meanwhile."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    munged = ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--force", "--foreground"]
    stack.enter_context(daemon(munged, Path(os.devnull), {}))
    until(lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0, 60)


@contextmanager
def daemon(argv: list[str], out: Path, env: dict[str, str]) -> Iterator[None]:
    with out.open("ab") as file:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                                   env={**os.environ, **env})  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
