"""Write down what the ranks of this machine are doing, before they are ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from dtrain.runs import RunDir
from dtrain.runs.files import write_json
from dtrain.runs.hang import FLIGHT, FLIGHT_PIPE, SHOW_STACKS, Stuck, main_thread, stacks_path
from dtrain.runs.host import host_name
from dtrain.runs.process import MARK
from dtrain.runs.pulse import Place

STACKS_S = 10.0
"""What a rank gets to write its stacks."""
WRITTEN_S = 0.5
"""They are whole once nothing has been added for so long: of several threads the main one comes last."""
FLIGHT_S = 5.0
PYSPY_S = 10.0


def record(run: RunDir, attempt: int, node: int, folder: Path, places: Iterable[Place],
           stale: Mapping[int, float]) -> None:  # fmt: skip
    """Leave `hang/attempt-N/`: node-K.json with what `Stuck` says of each rank, rank-R.txt with its stacks, and what
    NCCL's recorder has. `folder` is where the ranks say where they are.
    """
    places = [place for place in places if _is_ours(place.pid, run)]
    to = run.hang_dir(attempt)
    to.mkdir(parents=True, exist_ok=True)
    halted = {place.rank for place in places if _is_halted(place.pid)}
    running = [place for place in places if place.rank not in halted]
    _ask_for_flights(folder, running)
    _show(folder, running)
    ranks, native = [], _native(places, halted)
    for place in places:
        path = to / f"rank-{place.rank}.txt"
        text = _read(stacks_path(folder, place.rank))
        path.write_text(text + native.get(place.rank, ""), encoding="utf-8")
        ranks.append(Stuck(place, host_name(), round(stale.get(place.rank, 0.0), 1), place.rank in halted,
                           main_thread(text), path.relative_to(run.path).as_posix()))  # fmt: skip
    _take_flights(folder, running, to)
    write_json(to / f"node-{node}.json", {"ranks": [dataclasses.asdict(one) for one in ranks]})


def _is_ours(pid: int, run: RunDir) -> bool:
    """Whether it is still the rank: a number may be given again."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        return bool(psutil.Process(pid).environ().get(MARK) == str(run.path))
    return False


def _is_halted(pid: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    return False


def _show(folder: Path, places: list[Place]) -> None:
    """Ask for stacks, and wait until nothing is added to them. Not one that is halted: it would have to go on."""
    for place in places:
        with contextlib.suppress(OSError):
            os.kill(place.pid, SHOW_STACKS)
    paths = [stacks_path(folder, place.rank) for place in places]
    began = grown = time.monotonic()
    before: list[int] = []
    while (now := time.monotonic()) - began < STACKS_S:
        sizes = [len(_read(path)) for path in paths]
        if sizes != before:
            before, grown = sizes, now
        elif all(sizes) and now - grown >= WRITTEN_S:
            return
        time.sleep(0.1)


def _native(places: list[Place], halted: set[int]) -> dict[int, str]:
    """The same by py-spy, where it is there and may look: with frames of C, or of one that is halted."""
    pyspy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if pyspy is None:
        return {}
    looking = {
        place.rank: subprocess.Popen([pyspy, "dump", "--nonblocking" if place.rank in halted else "--native", "--pid",
                                      str(place.pid)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True, errors="replace")
        for place in places
    }  # fmt: skip
    found, deadline = {}, time.monotonic() + PYSPY_S
    for rank, process in looking.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        if process.returncode == 0:
            found[rank] = f"\npy-spy dump\n{said}"
    return found


def _ask_for_flights(folder: Path, places: list[Place]) -> None:
    for place in places:
        with contextlib.suppress(OSError):  # there is no pipe without NCCL, and nobody reads one that has ended
            pipe = os.open(folder / f"{FLIGHT_PIPE}{place.rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(pipe, b"1\n")
            finally:
                os.close(pipe)


def _take_flights(folder: Path, places: list[Place], to: Path) -> None:
    asked = [place.rank for place in places if (folder / f"{FLIGHT_PIPE}{place.rank}.pipe").exists()]
    deadline = time.monotonic() + FLIGHT_S
    while time.monotonic() < deadline and not all((folder / f"{FLIGHT}{rank}").exists() for rank in asked):
        time.sleep(0.1)
    for rank in asked:
        with contextlib.suppress(OSError):
            shutil.copyfile(folder / f"{FLIGHT}{rank}", to / f"{FLIGHT}{rank}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
