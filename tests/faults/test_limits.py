"""What the system refuses to a run: memory, open files, a port, the folder that it is in."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.verify import committed
from dtrain.runs import RunDir
from tests.e2e.command import SMALL, dtrain, workers_of, write_texts
from tests.faults.expect import assert_same_result, steps_of
from tests.faults.harness import Fault, launch
from tests.faults.test_storage import needs_mount, outcome

pytestmark = pytest.mark.slow

STEPS = 8


def _at_update(number: int, do: Callable[[], None]) -> None:
    """On rank 1, before its optimizer takes that step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    updates = list[int]()

    def hook(*_: Any) -> None:
        updates.append(1)
        if len(updates) == number:
            do()

    if os.environ["RANK"] == "1":
        register_optimizer_step_pre_hook(hook)


def _no_more_memory() -> None:
    """When it takes its moments."""

    def limit() -> None:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has, has))

    _at_update(1, limit)


def _no_more_files() -> None:
    """As a process ends up that forgets to close some."""

    def open_all() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 9,) * 2)
        with contextlib.suppress(OSError):
            while True:
                os.open(os.devnull, os.O_RDONLY)

    _at_update(2, open_all)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are set by what /proc says")
@pytest.mark.parametrize(
    ("before", "hint"), [(_no_more_memory, "out of memory: "), (_no_more_files, "ulimit -n 65536")]
)
def test_a_limit_of_the_system_is_named(folder: Path, before: Callable[[], None], hint: str) -> None:
    run = RunDir(folder / "runs" / f"limit{before.__name__}")
    typed = ("train.steps=2", "model.hidden=512", "checkpoint.async=false")
    ended = launch(folder, run.name, *typed, fault=Fault(before=before))
    assert ended.code == 3, ended.said
    assert "hint: " in ended.err, ended.err
    assert hint in ended.err
    assert ended.err.splitlines()[-1].startswith("rank ")
    assert launch(folder, run.name, *typed).code == 0


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder that is mounted from elsewhere; what loses it, and what brings it back."""
    there, here = tmp_path / "server", tmp_path / "shared"
    there.mkdir()
    here.mkdir()

    def call(*argv: Any) -> None:
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")

    def mount() -> None:
        call("mount", "--bind", there, here)

    def lose() -> None:
        call("umount", "--lazy", here)

    mount()
    yield here, lose, mount
    subprocess.run(["umount", "--lazy", here], capture_output=True)


@needs_mount
def test_a_shared_folder_that_is_lost(
    folder: Path, whole: Callable[[int], RunDir], shared: tuple[Path, Callable[[], None], Callable[[], None]]
) -> None:
    """Nothing is saved on the machine's own disk, which is what the place of the mount then is."""
    here, lose, mount = shared
    run, lost = RunDir(here / "lost"), list[int]()

    def kill(run: RunDir, attempt: int) -> bool:
        if not lost and len(committed(run.checkpoints)) == 2:
            lost.append(1)
            lose()
        return False

    typed = ["train.steps=24", f"run.dir={here}", f"run.cache={folder / 'runs' / '.cache'}", "checkpoint.async=false"]
    ended = launch(folder, run.name, *typed, fault=Fault(kill=kill, fail="ckpt.stage:sleep=0.3"))
    assert lost
    assert ended.code == 3, ended.said
    assert outcome(run)["kind"] == "storage"
    assert "No such file or directory" in ended.err
    assert not run.checkpoints.exists()
    mount()
    assert len(steps_of(run)) == 2
    again = launch(folder, run.name, *typed)
    assert again.code == 0, again.said
    assert_same_result(run, whole(24))


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl")
    with socket.create_server(("", 0)) as taken:
        done = dtrain(tmp_path, "launch", *SMALL, "dataset.path=texts.jsonl", "launcher=torchrun", "launcher.nodes=1:2",
                      "launcher.last_call_s=0", "launcher.procs=1", f"launcher.port={taken.getsockname()[1]}")  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "launcher.port=auto takes a free one" in done.stderr
    assert workers_of(tmp_path / "runs" / "demo") == []
