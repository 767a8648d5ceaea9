"""Disks that are full, slow, read-only or not shared; and two jobs on one folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.storage import HostBuffer
from dtrain.checkpoint.verify import committed, problems
from dtrain.engine import worker
from dtrain.engine.engine import Saving
from dtrain.failpoints import VARIABLE
from dtrain.runs import RunDir
from tests.contract.small import Recipe, Record, make, make_built, overrides
from tests.e2e.command import rows
from tests.faults.expect import assert_same_result, steps_of, unfinished
from tests.faults.harness import Fault, launch
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

STEPS, MANY = 8, 24
CAN_MOUNT = os.geteuid() == 0 and Path("/proc").is_dir()


def outcome(run: RunDir) -> dict[str, Any]:
    return json.loads(run.outcome.read_text())


def kinds(run: RunDir) -> list[str]:
    return [event["kind"] for event in rows(run.events)]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A small disk of its own."""
    made: list[Path] = []

    def mount(size: str, name: str = "disk") -> Path:
        path = tmp_path / name
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", path], check=True)


needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="only root may mount")


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run = RunDir(folder / "runs" / "full-stop")
    typed = [f"train.steps={STEPS}", "checkpoint.async=false"]
    ended = launch(folder, run.name, *typed, fault=Fault(fail="ckpt.tensors:full:rank=1:after=2"))
    assert ended.code == 3, ended.said
    assert outcome(run)["kind"] == "storage"
    last = ended.err.splitlines()[-1]
    for part in ("step 3 was not saved", "rank 1: No space left on device", "checkpoint.on_error=warn", "next: less"):
        assert part in last
    assert steps_of(run) == [2, 1]
    assert unfinished(run) == [], "it takes no room"
    assert kinds(run).count("save failed") == 1
    assert launch(folder, run.name, f"train.steps={STEPS}").code == 0
    assert_same_result(run, whole(STEPS))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_told_to_warn_it_goes_on_and_the_next_save_is_tried(
    folder: Path, whole: Callable[[int], RunDir], asynchronous: str
) -> None:
    run = RunDir(folder / "runs" / f"full-warn-{asynchronous}")
    typed = [f"train.steps={STEPS}", "checkpoint.on_error=warn", f"checkpoint.async={asynchronous}"]
    ended = launch(folder, run.name, *typed, fault=Fault(fail="ckpt.mid:full:rank=1:times=1"))
    assert ended.code == 0, ended.said
    (failed,) = [event for event in rows(run.events) if event["kind"] == "save failed"]
    assert failed["step"] == 1
    assert failed["error"] == f"{run.checkpoints}: rank 1: No space left on device"
    assert steps_of(run)[0] == STEPS
    assert_same_result(run, whole(STEPS))


def test_where_the_last_save_fails_the_end_tries_again(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run = RunDir(folder / "runs" / "full-last")
    typed = [f"train.steps={STEPS}", f"checkpoint.every_steps={STEPS}", "checkpoint.on_error=warn"]
    ended = launch(folder, run.name, *typed, fault=Fault(fail="ckpt.manifest:full:times=1"))
    assert ended.code == 0, ended.said
    assert kinds(run) == ["launched", "training", "save failed", "saved", "ended"]
    assert_same_result(run, whole(STEPS))


def _small_files() -> None:
    """No file of rank 1 may be as large as its part of a checkpoint."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_file_that_the_system_cuts_off_is_no_checkpoint(folder: Path) -> None:
    run = RunDir(folder / "runs" / "limited")
    ended = launch(folder, run.name, f"train.steps={STEPS}", fault=Fault(before=_small_files))
    assert ended.code == 3, ended.said
    assert f"rank 1: {os.strerror(errno.EFBIG)}" in ended.err
    assert outcome(run)["kind"] == "storage"
    assert (committed(run.checkpoints), unfinished(run)) == ([], [])


@needs_mount
def test_a_disk_that_fills_up_in_a_save_and_has_room_again(
    folder: Path, mounted: Callable[..., Path], whole: Callable[[int], RunDir]
) -> None:
    """The kernel itself says so. Somebody else's file takes all the room while a save is written, and goes again."""
    disk = mounted("8M")
    run, filler = RunDir(folder / "runs" / "full-disk"), disk / "filler"
    run.path.mkdir(parents=True)
    run.checkpoints.symlink_to(disk)  # what else a run writes is elsewhere

    def fill(run: RunDir, attempt: int) -> bool:
        if "save failed" in (told := kinds(run)):
            filler.unlink(missing_ok=True)
        elif "saved" in told and unfinished(run) and not filler.exists():
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        return False

    typed = [f"train.steps={MANY}", "checkpoint.on_error=warn", "checkpoint.keep_last=1"]
    ended = launch(
        folder, run.name, *typed, fault=Fault(fail="ckpt.tensors:sleep=0.1,train.forward:sleep=0.03", kill=fill)
    )
    assert ended.code == 0, ended.said
    failed = [event["error"] for event in rows(run.events) if event["kind"] == "save failed"]
    assert failed
    assert all("No space left on device" in error or "no space left: a checkpoint takes" in error for error in failed)
    assert any(os.strerror(errno.ENOSPC) in error for error in failed), "in the middle of a save, not before it"
    assert_same_result(run, whole(MANY))


@needs_mount
def test_where_there_is_no_room_nothing_is_written(folder: Path, mounted: Callable[..., Path]) -> None:
    disk = mounted("4M")
    run = RunDir(disk / "tight")
    ended = launch(
        folder, run.name, f"train.steps={STEPS}", f"run.dir={disk}", f"run.cache={folder / 'runs' / '.cache'}"
    )
    assert ended.code == 3, ended.said
    assert "no space left: a checkpoint takes" in ended.err
    assert (committed(run.checkpoints), unfinished(run)) == ([], [])


@needs_mount
def test_a_disk_that_becomes_read_only(folder: Path, mounted: Callable[..., Path]) -> None:
    """As a disk does that has errors. The checkpoints are on it, by a link, and what was begun cannot be removed."""
    disk = mounted("16M")
    run = RunDir(folder / "runs" / "read-only")
    run.path.mkdir(parents=True)
    run.checkpoints.symlink_to(disk)
    done: list[int] = []

    def remount(run: RunDir, attempt: int) -> bool:
        if not done and steps_of(run):
            # A disk with open files cannot be made read-only: between two saves it can.
            told = subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True)
            done.extend([1] if told.returncode == 0 else [])
        return False

    typed = ["train.steps=60", "checkpoint.every_steps=5"]
    ended = launch(folder, run.name, *typed, fault=Fault(kill=remount, fail="train.forward:sleep=0.1"))
    assert ended.code == 3, ended.said
    assert "rank 0: Read-only file system" in ended.err
    assert outcome(run)["kind"] == "storage"
    assert steps_of(run)
    refused = launch(folder, run.name, *typed)
    assert refused.code == 2, refused.said
    assert "Read-only file system" in refused.err
    assert len(run.attempts()) == 1
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert launch(folder, run.name, *typed).code == 0


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused_first(
    folder: Path, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    """Before data is prepared, and before any rank."""
    place = tmp_path / "runs" / "closed" / where
    if os.geteuid() == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
        disk = request.getfixturevalue("mounted")("1M")
        place.symlink_to(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        said = "Read-only file system"
    else:
        place.mkdir(parents=True)
        place.chmod(0o500)
        said = "Permission denied"
    ended = launch(folder, "closed", f"run.dir={tmp_path / 'runs'}")
    assert ended.code == 2, ended.said
    assert f"{place}: cannot write in " in ended.err
    assert said in ended.err
    assert not (tmp_path / "runs" / ".cache").exists(), "nothing was prepared"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    make(path)
    return path


def _saving(built: Any, root: Path) -> Saving:
    saver = Saver(root, built.config.checkpoint, built.comm.sibling())
    return Saving(saver, built.describe({}, {"size": built.comm.size}), 1, at_end=True, stop_on_error=False)


def _on_a_slow_disk(small: Path, root: Path, typed: list[str]) -> dict[str, Any]:
    from dtrain.engine.state import Progress

    os.environ[VARIABLE] = "ckpt.tensors:sleep=0.5"
    built, notes = make_built(small, typed), Record()
    writing, places = [0], set()
    plain = HostBuffer.take

    def take(self: HostBuffer, of: Any) -> Any:
        copies = plain(self, of)
        writing.append(sum(thread.name.startswith("save-") for thread in threading.enumerate()))
        places.add(copies[0].view.untyped_storage().data_ptr())
        return copies

    HostBuffer.take = take
    built.engine.run([notes], Progress(), _saving(built, root))
    return {"notes": notes.notes, "most": max(writing), "buffers": len(places), "steps": len(notes.reports)}


def test_saves_on_a_slow_disk_do_not_pile_up(small: Path, tmp_path: Path) -> None:
    """A save of each step, and each takes longer than many steps."""
    typed = overrides(small, Recipe(4, steps=30), "strategy=ddp", "checkpoint.keep_last=99")
    for said in run_ranks(_on_a_slow_disk, small, tmp_path, typed, size=2):
        assert said["steps"] == 30
        assert (said["most"], said["buffers"]) == (0, 1), "none was being written when the next began, in one buffer"
        postponed = [note for note in said["notes"] if "the last save is still being written; this one follows" in note]
        saved = [note for note in said["notes"] if note.startswith("saved step")]
        assert len(postponed) > len(saved) > 1
    folders = committed(tmp_path)
    assert len(folders) == len(saved) < 30
    assert folders[0].name == "step-00000030"
    assert [problem for folder in folders for problem in problems(folder)] == []


def _fails_unheard(small: Path, root: Path, typed: list[str]) -> list[Any]:
    """What the saver says of a save that failed, before and after it is waited for."""
    built = make_built(small, typed)
    saving = _saving(built, root)
    saving.saver.save(built.strategy.shards(), saving.describe(built.engine._state, {}), {})
    for thread in threading.enumerate():
        if thread.name.startswith("save-"):
            thread.join()
    said: list[Any] = [saving.saver.failed, saving.saver.finished()]
    saving.saver.wait()
    failed = saving.saver.finished()
    return [*said, failed and failed.error, saving.saver.finished()]


def test_a_failure_is_told_when_all_wait_for_it_and_no_earlier(small: Path, tmp_path: Path) -> None:
    """One rank knows of it before another: told at once, one would stop at another step than the rest."""
    root = tmp_path / "file"
    root.write_text("")
    for said in run_ranks(
        _fails_unheard, small, root / "in", overrides(small, Recipe(4, steps=1), "strategy=ddp"), size=2
    ):
        assert said == [True, None, f"{root / 'in'}: rank 0: Not a directory", None]


def _cannot_clean_up(small: Path, root: Path, typed: list[str]) -> list[str]:
    from dtrain.checkpoint import saver
    from dtrain.engine.state import Progress

    def discard(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.environ[VARIABLE] = "ckpt.manifest:full"
    saver.discard = discard
    built, notes = make_built(small, typed), Record()
    built.engine.run([notes], Progress(), _saving(built, root))
    return notes.notes


def test_where_the_rest_cannot_be_removed_the_first_error_is_told(small: Path, tmp_path: Path) -> None:
    typed = overrides(small, Recipe(4, steps=1), "strategy=ddp")
    for notes in run_ranks(_cannot_clean_up, small, tmp_path, typed, size=2):
        assert set(notes) == {f"step 1 was not saved: {tmp_path}: rank 0: No space left on device"}


def _not_finite(small: Path, root: Path, typed: list[str]) -> str:
    from dtrain.engine.state import Progress
    from dtrain.errors import NonFiniteError

    os.environ[VARIABLE] = "ckpt.tensors:sleep=0.3"
    built, notes = make_built(small, typed), Record()
    objective = built.engine._objective

    def breaks(module: Any, batch: Any) -> Any:
        loss = objective(module, batch)
        if len(notes.reports) == 2:
            loss.total.data.fill_(float("nan"))
        return loss

    built.engine._objective = breaks
    try:
        built.engine.run([notes], Progress(), _saving(built, root))
    except NonFiniteError as error:
        return str(error)
    return ""


def test_what_is_being_written_when_a_loss_is_not_finite_is_finished(small: Path, tmp_path: Path) -> None:
    typed = overrides(small, Recipe(4, steps=9), "strategy=ddp")
    for said in run_ranks(_not_finite, small, tmp_path, typed, size=2):
        assert said.startswith("the loss is not finite")
    whole = committed(tmp_path)  # of step 1, unless that took longer than the save of it
    assert {path.name for path in whole} - {"step-00000002"} == {"step-00000001"}
    assert [problem for folder in whole for problem in problems(folder)] == []
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_second_job_is_refused(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run = RunDir(folder / "runs" / "two")
    second: list[Any] = []

    def launch_too(run: RunDir, attempt: int) -> bool:
        if not second and committed(run.checkpoints):
            second.append(launch(folder, run.name, f"train.steps={STEPS}"))
        return False

    ended = launch(folder, run.name, f"train.steps={STEPS}", fault=Fault(fail="ckpt.stage:sleep=0.05", kill=launch_too))
    assert ended.code == 0, ended.said
    assert second[0].code == 2
    assert f"{run.path}: in use by process {os.getpid()} on " in second[0].err
    assert "give this one its own `run.name`" in second[0].err
    assert len(run.attempts()) == 1
    assert_same_result(run, whole(STEPS))


def _sees_another_folder() -> None:
    worker.SEEN_S = 0.5
    plain = RunDir.__init__

    def elsewhere(self: RunDir, path: Any) -> None:
        plain(self, path)
        if os.environ["RANK"] == "1":
            self.checkpoints = self.path / "node-1"

    RunDir.__init__ = elsewhere


def test_a_folder_that_the_ranks_do_not_share_is_refused(folder: Path) -> None:
    run = RunDir(folder / "runs" / "not-shared")
    ended = launch(folder, run.name, f"train.steps={STEPS}", fault=Fault(before=_sees_another_folder))
    assert ended.code == 2, ended.said
    (line,) = ended.err.splitlines()  # as the first rank to fail calls the folder
    assert line.startswith(f"error: run.dir: ranks [1] do not see what rank 0 writes to {run.path}/")
    assert line.endswith("; run.dir must be on a file system that all nodes share")
    assert unfinished(run) == []


def _saves_elsewhere(small: Path, root: Path, typed: list[str]) -> list[str]:
    from dtrain.engine.state import Progress

    built, notes = make_built(small, typed), Record()
    built.engine.run([notes], Progress(), _saving(built, root / str(built.comm.rank)))
    return notes.notes


def test_a_save_into_a_folder_that_a_rank_does_not_see_is_none(small: Path, tmp_path: Path) -> None:
    typed = overrides(small, Recipe(4, steps=3), "strategy=ddp")
    for rank, notes in enumerate(run_ranks(_saves_elsewhere, small, tmp_path, typed, size=2)):
        assert notes
        for note in notes:
            if "follows it" not in note:
                assert f"was not saved: {tmp_path / str(rank)}: rank 1: " in note
                assert "is not seen by this rank: run.dir must be on a file system that all nodes share" in note
    assert not list((tmp_path / "0").iterdir())
