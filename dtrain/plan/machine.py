"""What this machine has, found without torch: the plan runs on login nodes."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

_PEAK_FLOPS = {
    "B200": 2250e12, "GB200": 2500e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "GH200": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bf16 (V100, T4: fp16) matrix FLOP/s by the makers' data sheets. Longest name that matches wins."""


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    cores: int
    memory_bytes: int
    gpus: int
    gpu_name: str
    """Of the first one; empty without a GPU."""
    gpu_memory_bytes: int


def look(env: Mapping[str, str] = os.environ) -> Machine:
    """What is here; a GPU counts when its driver answers and CUDA_VISIBLE_DEVICES does not hide it."""
    name, memory, count = _gpus() if Path("/proc/driver/nvidia/version").exists() else ("", 0, 0)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(num_cores(), pages * size, count, name if count else "", memory if count else 0)


def num_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 peak of a device, or None where none is known."""
    found = [key for key in _PEAK_FLOPS if key in gpu_name]
    return _PEAK_FLOPS[max(found, key=len)] if found else None


def _gpus() -> tuple[str, int, int]:
    ask = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", 0, 0
    lines = [line.rsplit(",", 1) for line in out.splitlines() if "," in line]
    return (lines[0][0].strip(), int(lines[0][1]) * 2**20, len(lines)) if lines else ("", 0, 0)
