"""What the benchmarks share: the machine in words, and a section of docs/benchmarks.md."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BUSY_CORES = 0.1
"""Had by others, above which a figure is in doubt."""
DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    return f"{cpu}, {cores()} cores, {platform.system()}, Python {platform.python_version()}"


def versions(*names: str) -> str:
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    return os.getloadavg()[0]


class Others:
    """Who else used the machine since this was made: time of its cores that is neither ours nor our ended children's.

    What the kernel does for our own writes counts as theirs, and what the host took away does too.
    """

    def __init__(self) -> None:
        self._began = self._look()

    @property
    def cores(self) -> float:
        """That they had, on average."""
        return (self._look()[1] - self._began[1]) / max(self._look()[0] - self._began[0], 1e-9)

    @property
    def busy(self) -> bool:
        return self.cores > BUSY_CORES

    @staticmethod
    def _look() -> tuple[float, float]:
        """Seconds that have passed, and seconds of cores that others had of them."""
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used - sum(os.times()[:4])


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def spread(values: Sequence[float]) -> str:
    """How far the values lie apart, of their median."""
    return f"±{(max(values) - min(values)) / 2 / statistics.median(values):.1%}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(name: str, text: str, path: Path = DOCS) -> None:
    """Put `text` in place of what is between the section's markers, or at the end; other text stays."""
    begin, end = f"<!-- {name}: written by bench/{name}.py -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        new = before + section + rest.split(end, 1)[1]
    else:
        new = old.rstrip() + "\n\n" + section + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new, encoding="utf-8")
