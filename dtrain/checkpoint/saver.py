"""Saving: a copy in host memory, files written behind the training's back, and a commit that is whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

from dtrain.checkpoint import manifest, retention
from dtrain.checkpoint.manifest import File, Manifest, folder_name
from dtrain.checkpoint.storage import HostBuffer, Part, copied_apart, file_name, parts, write_file
from dtrain.errors import CheckpointError, StorageError
from dtrain.failpoints import reach
from dtrain.folders import discard, sync, temporary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dtrain.comm import AbstractComm
    from dtrain.config.schema import Checkpoint
    from dtrain.strategies.base import Shard

SPARE_BYTES = 1 << 22
"""Free space that a save leaves besides its own size."""


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """What became of one save; the same on every rank."""

    step: int
    num_bytes: int
    pause_s: float
    """What training waited for it, on this rank."""
    write_s: float
    error: str | None = None
    """Why there is no checkpoint of it."""
    removed: tuple[str, ...] = ()
    """Older checkpoints that were removed after it."""
    problem: str | None = None
    """What went wrong after it was committed, with pointers or older ones."""

    def line(self) -> str:
        """For the screen."""
        if self.error is not None:
            return f"step {self.step} was not saved: {self.error}"
        size = f"{self.num_bytes / 1e9:,.2f} GB" if self.num_bytes >= 1e8 else f"{self.num_bytes / 1e6:,.1f} MB"
        line = (f"saved step {self.step}: {size} in {self.write_s:.1f} s, of which training "
                f"waited {self.pause_s:.2f} s")  # fmt: skip
        return line if self.problem is None else f"{line}; but older ones may be left: {self.problem}"


class _Commit(NamedTuple):
    """What came of writing."""

    num_bytes: int = 0
    removed: tuple[str, ...] = ()
    problem: str | None = None
    error: str | None = None


class AbstractSaver(Protocol):
    """What the engine saves with."""

    @property
    def busy(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def save(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None: ...

    def save_apart(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None: ...

    def finished(self) -> Saved | None: ...

    def wait(self) -> None: ...


@final
class NoSaver:
    """Where nothing is to be saved."""

    busy = failed = False

    def save(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None: ...

    def save_apart(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None: ...

    def finished(self) -> Saved | None:
        return None

    def wait(self) -> None: ...


@final
class Saver:
    """One save at a time. Every rank has one, and calls it at the same steps."""

    def __init__(self, root: Path, policy: Checkpoint, comm: AbstractComm) -> None:
        """`root`: where the run's checkpoints are. `comm`: of the same ranks, and used by nothing else, so that the
        writing thread's collectives never meet the training's.
        """
        self._root, self._policy, self._comm = root, policy, comm
        self._buffer = HostBuffer()
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []

    @property
    def busy(self) -> bool:
        """Whether a save of this rank is still being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `finished` has a failure to tell."""
        return any(saved.error is not None for saved in self._finished)

    def save(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None:
        """Save the shards as they are now. Returns when they may change. Collective.

        `what` lacks only its files. `blobs`: this rank's further bytes, by name. What came of it, `finished` tells.
        """
        self.wait()
        began = time.perf_counter()
        reach("ckpt.stage")
        order = {name: i for i, name in enumerate(what.parameters)}
        mine = parts(shards, order)
        if not self._policy.asynchronous:
            self._write(mine, what, blobs, began, None)
            return
        staged = self._buffer.take(mine)
        pause_s = time.perf_counter() - began
        self._thread = threading.Thread(target=self._write, args=(staged, what, blobs, began, pause_s), daemon=True,
                                        name=f"save-{what.step}")  # fmt: skip
        self._thread.start()

    def save_apart(self, shards: Iterable[Shard], what: Manifest, blobs: Mapping[str, bytes]) -> None:
        """The same where the training stands still for good, in the middle of a step: all at once, and on a device
        beside what is queued there, which may never end. Collective.
        """
        self.wait()
        began = time.perf_counter()
        order = {name: i for i, name in enumerate(what.parameters)}
        self._write(copied_apart(parts(shards, order)), what, blobs, began, None)

    def finished(self) -> Saved | None:
        """What became of the last save, once; None where there is nothing new.

        A failure is told after `wait` alone: all ranks must hear of it at the same step, and one knows it earlier than
        another.
        """
        if not self._finished or (self._thread is not None and (self._thread.is_alive() or self.failed)):
            return None
        return self._finished.pop(0)

    def wait(self) -> None:
        """Until nothing of this rank is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, mine: list[Part], what: Manifest, blobs: Mapping[str, bytes], began: float,
               pause_s: float | None) -> None:  # fmt: skip
        try:
            done = self._commit(mine, what, blobs)
        except Exception as raised:  # noqa: BLE001  the main thread tells it: here nobody would hear
            done = _Commit(error=f"{type(raised).__name__}: {raised}")
        took = time.perf_counter() - began
        self._finished.append(Saved(what.step, done.num_bytes, took if pause_s is None else pause_s, took, done.error,
                                    done.removed, done.problem))  # fmt: skip

    def _commit(self, mine: list[Part], what: Manifest, blobs: Mapping[str, bytes]) -> _Commit:
        """Write, and put in place. Collective."""
        folder = Path()
        said, error = self._agreed(lambda: self._open(what) if self._comm.rank == 0 else {})
        if error is None:
            folder = self._root / said[0]["folder"]
            said, error = self._agreed(lambda: self._write_mine(folder, mine, blobs))
        if error is None:
            files = {one["name"]: File(one["bytes"], one["xxh3"]) for one in said}
            whole = dataclasses.replace(what, files=files)
            said, error = self._agreed(lambda: self._close(folder, whole) if self._comm.rank == 0 else {})
            if error is None:
                return _Commit(whole.num_bytes, tuple(said[0]["removed"]), said[0]["problem"])
        if self._comm.rank == 0 and folder != Path():
            with contextlib.suppress(OSError):  # the first error is the one to tell
                discard(folder)
        return _Commit(error=error)

    def _agreed(self, do: Any) -> tuple[list[dict[str, Any]], str | None]:
        """What every rank's part gave, and the first error of any. Collective."""
        try:
            mine = {"ok": do()}
        except Exception as error:  # noqa: BLE001  whatever it is, every rank must hear of it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            mine = {"error": reason}
        said = [json.loads(one) for one in self._comm.gather(json.dumps(mine))]
        wrong = [f"rank {rank}: {one['error']}" for rank, one in enumerate(said) if "error" in one]
        if wrong:
            return [], f"{self._root}: {'; '.join(wrong[:4])}"
        return [one["ok"] for one in said], None

    def _open(self, what: Manifest) -> dict[str, str]:
        """The folder that all write into; refused at once where there is no room."""
        if not self._root.is_dir():
            self._root.mkdir()  # alone: where the run folder is gone, so is the disk that it was on
            sync(self._root.parent)
        need = sum(one.num_bytes for one in what.parameters.values()) + SPARE_BYTES
        free = shutil.disk_usage(self._root).free
        if free < need:
            raise StorageError(f"no space left: a checkpoint takes {need / 1e9:,.3f} GB and {free / 1e9:,.3f} GB are "
                               f"free; make room, or set checkpoint.keep_last lower")  # fmt: skip
        folder = temporary(self._root)
        folder.mkdir()
        return {"folder": folder.name}

    def _write_mine(self, folder: Path, mine: list[Part], blobs: Mapping[str, bytes]) -> dict[str, Any]:
        reach("ckpt.tensors")
        if not folder.is_dir():
            raise StorageError(
                f"{folder} is not seen by this rank: run.dir must be on a file system that all nodes share"
            )
        name = file_name(self._comm.rank)
        return {"name": name, **dataclasses.asdict(write_file(folder / name, mine, blobs))}

    def _close(self, folder: Path, whole: Manifest) -> dict[str, Any]:
        """Manifest last, one rename, and only then anything old is removed."""
        reach("ckpt.manifest")
        path = folder / manifest.NAME
        path.write_bytes(manifest.dump(whole))
        sync(path)
        sync(folder)
        reach("ckpt.rename")
        final = self._root / folder_name(whole.step)
        if os.path.lexists(final):  # passed over when this attempt began: damaged
            discard(final)
        folder.rename(final)
        sync(self._root)
        reach("ckpt.committed")
        removed, problem = [], None
        try:
            removed = retention.prune(self._root, self._policy, newest=whole.step)
        except (OSError, CheckpointError) as error:  # it is committed all the same
            problem = str(error)
        return {"removed": [one.name for one in removed], "problem": problem}
