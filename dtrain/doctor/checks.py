"""What is looked at on one machine, each by a function that yields what it found."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dtrain.doctor._children import Said, ask, ask_all
from dtrain.doctor.finding import Finding
from dtrain.plan.machine import Machine
from dtrain.runs.host import free_port

PROBE = "dtrain.doctor._probe"
LEAST_BYTES, FEW_BYTES = 1e9, 20e9
"""Free space that no run does without, and that a run of some size soon fills."""
SLOW_MB_S = 100.0
WRITE_BYTES, BLOCK_BYTES, WRITE_S = 256 << 20, 4 << 20, 3.0
SMALL_FILES, SLOW_SMALL_S = 20, 0.1
FEW_FILES = 4096
SLOW_RANK = 1.5
LEAST_SHM = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What is to be looked at."""

    folder: Path
    """Where run folders are to be."""
    procs: int
    machine: Machine


def versions(place: Place) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        wanted = metadata.requires("dtrain") or []
    except metadata.PackageNotFoundError:
        yield Finding("versions", "warn", "dtrain is not installed, only found", "pip install -e . in its folder")
        return
    wrong, found = [], []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("torch", "deepspeed", "transformers"):
            found.append(f"{requirement.name} {version}")
    if wrong:
        yield Finding("versions", "fail", "; ".join(wrong), "pip install -U dtrain in this environment")
    else:
        said = [f"dtrain {metadata.version('dtrain')}", *sorted(found), f"python {platform.python_version()}"]
        yield Finding("versions", "ok", ", ".join(said))


def devices(place: Place) -> Iterator[Finding]:
    machine, said = place.machine, ask([PROBE, "devices"])
    if said.value is None:
        yield _failed("torch", said, "install torch again; nothing works without it")
        return
    one = said.value
    talks = [name for name in ("gloo", "nccl") if one[name]]
    text = f"{one['torch']}, {' and '.join(talks) or 'no backend between ranks'}"
    if not one["gloo"]:
        yield Finding("torch", "fail", text, "a build of torch with gloo is needed")
    else:
        yield Finding("torch", "ok", text)
    if machine.gpus and not one["gpus"]:
        yield Finding("devices", "fail", f"{machine.gpus} x {machine.gpu_name} here, and torch sees none",
                      "install torch's build for CUDA, or update the driver")  # fmt: skip
    elif machine.gpus and not one["nccl"]:
        yield Finding("devices", "fail", "GPUs, and torch has no NCCL", "install torch's build for CUDA")
    elif machine.gpus:
        more = "" if one["bf16"] else "; no bf16: runs take fp16"
        each = f"{machine.gpu_name}, {machine.gpu_memory_bytes / 2**30:.0f} GiB"
        talk = f"CUDA {one['cuda']}, NCCL {one.get('nccl_version')}"
        yield Finding("devices", "ok", f"{machine.gpus} x {each}, {talk}{more}")
    else:
        yield Finding("devices", "warn", f"no GPU; {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB",
                      "runs compute on the CPU here; where there should be a GPU, look at nvidia-smi")  # fmt: skip


_OPTIONAL = {
    "flash_attn": ("flash-attn", "model.attention=flash_attention_2"),
    "liger_kernel": ("liger-kernel", "model.loss=liger"),
    "bitsandbytes": ("bitsandbytes", "weights and optimizer state of 4 and 8 bits"),
}
"""By module: the package, and what it is for."""


def kernels(place: Place) -> Iterator[Finding]:
    there = [name for name, (package, _) in _OPTIONAL.items() if _installed(package)]
    names = ["attention", "deepspeed", *(["compiler"] if place.machine.gpus else []), *there]
    said = {name: ask([PROBE, name]) for name in names}
    for name in names:
        one, package = said[name], _OPTIONAL.get(name, (name, ""))[0]
        if one.value is None:
            yield _failed(package, one, "runs that use it fail; others do not" if name in _OPTIONAL else
                          "install it again")  # fmt: skip
        elif name == "deepspeed":
            nvme = "its op for NVMe can be compiled" if one.value["nvme"] else "no offload to NVMe: libaio is missing"
            yield Finding(package, "ok", f"{one.value['version']}, imported; {nvme}")
        elif one.value["on"] is None:
            yield Finding(package, "ok", "imported; it computes on GPUs only")
        else:
            yield Finding(package, "ok", f"ran on {one.value['on']}")
    missing = [package for name, (package, _) in _OPTIONAL.items() if name not in there]
    if missing:
        yield Finding("optional", "ok", f"not installed, and not needed: {', '.join(missing)}")


def disk(place: Place) -> Iterator[Finding]:
    """Space, speed and what a run folder needs of a file system."""
    folder = place.folder
    while not folder.is_dir():
        folder = folder.parent
    try:
        here = Path(tempfile.mkdtemp(prefix=".dtrain-doctor-", dir=folder))
    except OSError as error:
        yield Finding("disk", "fail", f"{folder}: cannot be written ({error.strerror})", "name another folder: --dir, "
                      "and run.dir of runs")  # fmt: skip
        return
    try:
        yield _space(folder)
        yield _speed(here)
        yield _semantics(here, folder)
    except OSError as error:
        yield Finding("disk", "fail", f"{folder}: {error.strerror}", "make room, or name another folder by run.dir")
    finally:
        shutil.rmtree(here, ignore_errors=True)


def _space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.1f} GB free in {folder} ({file_system(folder)})"
    if free < LEAST_BYTES:
        return Finding("space", "fail", text, "make room, or name another folder by run.dir")
    if free < FEW_BYTES:
        return Finding("space", "warn", text, "a checkpoint takes 12 bytes for each parameter that is trained, and "
                       "checkpoint.keep_last of them stay")  # fmt: skip
    return Finding("space", "ok", text)


def _speed(here: Path) -> Finding:
    block, written = os.urandom(BLOCK_BYTES), 0
    began = time.perf_counter()
    with (here / "large").open("wb", buffering=0) as file:
        while written < WRITE_BYTES and time.perf_counter() - began < WRITE_S:
            file.write(block)
            written += BLOCK_BYTES
        os.fsync(file.fileno())
    mb_s = written / 1e6 / (time.perf_counter() - began)
    began = time.perf_counter()
    for i in range(SMALL_FILES):
        tmp = here / f"{i}.tmp"
        with tmp.open("wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
        tmp.rename(here / str(i))
    small_s = (time.perf_counter() - began) / SMALL_FILES
    text = f"writes {mb_s:,.0f} MB/s, a small file in {1000 * small_s:.1f} ms"
    if mb_s < SLOW_MB_S or small_s > SLOW_SMALL_S:
        return Finding("speed", "warn", text, f"a 7B model's save is 84 GB, {84e3 / mb_s / 60:.0f} min there; "
                       f"a faster disk for run.dir, or fewer saves", {"writes, MB/s": mb_s})  # fmt: skip
    return Finding("speed", "ok", text, figures={"writes, MB/s": mb_s})


def _semantics(here: Path, folder: Path) -> Finding:
    """Locks, and a rename that replaces a folder's content in one step."""
    with (here / "lock").open("w") as first, (here / "lock").open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Finding("locks", "warn", f"{file_system(folder)} has no locks (flock)",
                           "two launches of one run may not notice each other on different machines")  # fmt: skip
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Finding("locks", "ok", "one holder at a time")
    return Finding("locks", "fail", "two holders of one lock", "the file system does not keep locks: name another "
                   "folder by run.dir")  # fmt: skip


def file_system(folder: Path) -> str:
    """Its kind, such as ext4 or nfs4; unknown where the system does not tell."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return kind
    real = str(folder.resolve())
    for line in lines:
        fields = line.split()
        where = fields[1].replace("\\040", " ")
        if (real == where or real.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
            best, kind = where, fields[2]
    return kind


def limits(place: Place) -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wrong = []
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        wrong.append((f"{files} open files", "ulimit -n 65536"))
    shm = Path("/dev/shm")
    if shm.is_dir() and (free := shutil.disk_usage(shm).free) < LEAST_SHM and place.machine.gpus > 1:
        wrong.append((f"/dev/shm has {free / 1e6:,.0f} MB", "docker run --shm-size=8g, or --ipc=host: NCCL needs it"))
    if wrong:
        yield Finding("limits", "warn", "; ".join(text for text, _ in wrong), "; ".join(advice for _, advice in wrong))
    else:
        yield Finding("limits", "ok", f"{files} open files")


def ranks(place: Place) -> Iterator[Finding]:
    """As many processes as a run here would have, or two."""
    yield between([("127.0.0.1", rank, rank) for rank in range(place.procs)], place.procs, free_port())


def between(mine: list[tuple[str, int, int]], size: int, port: int, timeout_s: float = 120.0,
            nodes: Sequence[str] = ()) -> Finding:  # fmt: skip
    """What the processes of this machine come to that sum up with all `size`: each of `mine` is the machine where they
    meet, a rank, and the rank within the machine. `nodes`: of each rank, where there are several machines.
    """
    on = [f" on {node}" for node in nodes] or [""] * size
    envs = [{"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(size), "MASTER_ADDR": host,
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} for host, rank, local in mine]  # fmt: skip
    if size == 1:
        return Finding("ranks", "ok", "one process only: nothing to measure")
    said = ask_all([[PROBE, "ranks"]] * len(mine), envs, timeout_s=timeout_s)
    bad = [(rank, one) for (_, rank, _), one in zip(mine, said, strict=True) if one.value is None]
    if bad:
        rank, first = bad[0]
        apart = "a firewall is between the ranks, or GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME should name the network"
        return Finding("ranks", "fail", f"rank {rank} of {size}{on[rank]}: {first.why}", first.hint or apart)
    values: list[dict[str, Any]] = [one.value for one in said if one.value is not None]
    slowest = min(value["gb_per_s"] for value in values)
    text = f"{size} processes sum up {slowest:.2f} GB/s over {values[0]['backend']}"
    took = values[0]["compute_ms"]
    late = max(range(size), key=lambda rank: took[rank])
    usual = sorted(took)[(size - 1) // 2]
    if took[late] > SLOW_RANK * usual:
        return Finding("ranks", "warn", f"{text}; rank {late}{on[late]} takes {took[late]:.1f} ms for what the others "
                       f"do in {usual:.1f}", "all wait for it: look at its clocks and temperature (nvidia-smi -q), and "
                       "at what else runs there")  # fmt: skip
    return Finding("ranks", "ok", text)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _failed(name: str, said: Said, advice: str) -> Finding:
    return Finding(name, "fail", said.why, said.hint or advice)


CHECKS: dict[str, Callable[[Place], Iterator[Finding]]] = {
    check.__name__: check for check in (versions, devices, kernels, disk, limits, ranks)
}
