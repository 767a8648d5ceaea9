"""What one rank does, one function for each thing that is measured. Started by checkpoint.py.

`python saves.py JOB.json`, with RANK and WORLD_SIZE as torchrun sets them. `storage` writes and reads one state again
and again, plainly and as dtrain does. The other ways train, and save on the way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

PIECE_BYTES = 1 << 24
LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Job:
    way: str
    out: str
    """Where rank N writes `rank-N.json`, and where what is saved goes."""
    config: dict[str, str]
    """dtrain's settled configuration, by strategy."""
    assets: str
    """A folder with the model's config.json."""
    rows: str
    """dtrain's prepared rows."""
    pad_id: int
    micro_batch: int
    length: int
    rounds: int
    """Of `storage`."""
    saves: int
    """Of the ways that train."""
    cycle: int
    """Steps from one look at the clock to the next: every second time a save comes first."""

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    @property
    def size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    @property
    def steps(self) -> int:
        """The first cycle warms up."""
        return self.cycle * (1 + 2 * self.saves)


# ------------------------------------------------------------------------------------------------- writing and reading


def storage(job: Job) -> dict:
    """Seconds of each round: to write plainly and to save; with a cold and a warm page cache, to read and to resume."""
    from dtrain.checkpoint.saver import Saver
    from dtrain.checkpoint.storage import parts
    from dtrain.checkpoint.verify import committed
    from dtrain.engine.state import State

    built, comm, config = _build(job, "fsdp2")
    built.strategy.restore({"updates": 1})
    with torch.no_grad():
        for shard in built.strategy.shards():
            for view in shard.views.values():
                view.normal_()  # a disk may store zeros for nothing
    policy = dataclasses.replace(config.checkpoint, asynchronous=False)
    what = built.describe({}, {"size": comm.size})(State(step=1), {})
    order = {name: i for i, name in enumerate(what.parameters)}
    mine = torch.empty(sum(part.view.numel() for part in parts(built.strategy.shards(), order))).normal_()
    plain, root, sibling = Path(job.out, f"plain-{job.rank}"), Path(job.out, "saved"), comm.sibling()
    found: dict[str, list[float]] = {}

    def save() -> None:
        saver = Saver(root, policy, sibling)
        saver.save(built.strategy.shards(), what, {})
        saved = saver.finished()
        assert saved is not None
        assert saved.error is None, saved

    def clock(name: str, do: Callable[[], None]) -> None:
        comm.barrier()
        began = time.perf_counter()
        do()
        comm.barrier()
        found.setdefault(name, []).append(time.perf_counter() - began)

    for round_ in range(job.rounds + 1):
        comm.barrier()
        plain.unlink(missing_ok=True)
        if job.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
            os.sync()  # nothing of the round before is left to be written or freed while the next is timed
        both = [("write", lambda: _plain_write(plain, mine)), ("save", save)]
        for name, do in both if round_ % 2 else both[::-1]:
            clock(name, do)
    num_params = sum(torch.Size(shape).numel() for shape in built.shapes.values())
    [folder], held = committed(root), []
    for round_ in range(job.rounds):
        both = [("read", lambda: _plain_read(plain, mine)), ("resume", lambda: _resume(folder, built, comm))]
        for name, do in both if round_ % 2 else both[::-1]:
            comm.barrier()
            held.append(_evict([plain, *folder.iterdir()]))
            clock(f"cold {name}", do)
            clock(f"warm {name}", do)
    seconds = {name: values[1:] if name in ("write", "save") else values for name, values in found.items()}
    return {"seconds": seconds, "held": max(held), "num_params": num_params, "bytes": _bytes_under(folder)}


def _plain_write(path: Path, of: torch.Tensor) -> None:
    raw = memoryview(of.numpy()).cast("B")
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(raw), PIECE_BYTES):
            left = raw[at : at + PIECE_BYTES]
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def _plain_read(path: Path, into: torch.Tensor) -> None:
    """Into memory that was used before, as a resume has it."""
    raw = memoryview(into.numpy()).cast("B")
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(raw[:PIECE_BYTES]):
            raw = raw[count:]


def _resume(folder: Path, built, comm) -> None:
    """As the worker does, into state that is there: fill this rank's shards, and find that all is what was written."""
    from dtrain.checkpoint import manifest
    from dtrain.checkpoint.restore import fill, share
    from dtrain.checkpoint.storage import Reader

    read = manifest.read(folder)
    reader = Reader(folder, read, prove=share(read.files, comm))
    fill(reader, built.strategy.shards())
    assert reader.problems() == []
    built.strategy.refresh()
    reader.close()


def _evict(paths: Iterable[Path]) -> float:
    """Have the page cache forget these files, which are on disk; the share of them that it still holds."""
    held = total = 0
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = path.stat().st_size
            pages = -(-size // mmap.PAGESIZE)
            with mmap.mmap(
                file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
            ) as mapped:
                start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                said = (ctypes.c_ubyte * pages)()
                if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), said):
                    raise OSError(ctypes.get_errno(), "mincore")
                held += sum(byte & 1 for byte in said)
                total += pages
    return held / total


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------- saving while it trains


class Clock:
    """How long each cycle of steps took, by turns without and with a save at its beginning.

    Between two cycles, untimed, what is still being written is waited for, and what was saved is removed.
    """

    def __init__(self, job: Job, wait: Callable[[], None]) -> None:
        self.folder = Path(job.out, "saved")
        self._job, self._wait = job, wait
        self._done, self._began, self._save_began = 0, 0.0, 0.0
        self.plain: list[float] = []
        self.saving: list[float] = []
        self.pauses: list[float] = []
        self.written: list[float] = []
        self.late: list[float] = []
        self.num_bytes = 0

    def tick(self) -> None:
        """A step is done."""
        self._done += 1
        if self._done % self._job.cycle:
            return
        now = time.perf_counter()
        if self._began:
            (self.plain if self._done // self._job.cycle % 2 == 0 else self.saving).append(now - self._began)
        self._wait()
        self.late.append(time.perf_counter() - now)
        dist.barrier()
        if self._job.rank == 0:
            self.num_bytes = max(self.num_bytes, _bytes_under(self.folder))
            shutil.rmtree(self.folder, ignore_errors=True)
            os.sync()
        dist.barrier()
        self._began = time.perf_counter()

    @property
    def due(self) -> bool:
        return self._done % (2 * self._job.cycle) == 0 and self._done < self._job.steps

    def save_begins(self) -> None:
        self._save_began = time.perf_counter()

    def training_goes_on(self) -> None:
        self.pauses.append(time.perf_counter() - self._save_began)

    def save_is_there(self) -> None:
        self.written.append(time.perf_counter() - self._save_began)

    def result(self) -> dict:
        job = self._job
        assert len(self.plain) == len(self.saving) == len(self.pauses) == len(self.written) == job.saves, vars(self)
        return {
            "step_s": statistics.median(self.plain) / job.cycle, "pauses": self.pauses, "written": self.written,
            "lost": [mine - plain for mine, plain in zip(self.saving, self.plain, strict=True)],
            "late": max(self.late), "bytes": self.num_bytes,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip


def dtrain_fsdp2(job: Job) -> dict:
    return _dtrain(job, "fsdp2")


def dtrain_zero3(job: Job) -> dict:
    return _dtrain(job, "zero3")


def _dtrain(job: Job, strategy: str) -> dict:
    """As dtrain/engine/worker.py does it."""
    from dtrain.checkpoint.saver import Saver
    from dtrain.engine.engine import Saving
    from dtrain.engine.state import Progress

    built, comm, config = _build(job, strategy)
    saver = Saver(Path(job.out, "saved"), config.checkpoint, comm.sibling())
    clock = Clock(job, saver.wait)
    describe = built.describe({}, {"size": comm.size})

    class Watched:
        """The saver, with the clock told when it is called and when it comes back."""

        busy, failed = property(lambda self: saver.busy), property(lambda self: saver.failed)
        finished, wait = staticmethod(saver.finished), staticmethod(saver.wait)

        def save(self, *args) -> None:
            saver.save(*args)
            clock.training_goes_on()

    def described(*args):
        clock.save_begins()
        return describe(*args)

    def told(saved) -> None:
        assert saved.error is None, saved
        clock.written.append(saved.write_s)

    class Ticks:
        def step(self, report) -> None:
            clock.tick()

        def eval(self, report) -> None: ...

        def note(self, line: str) -> None: ...

    saving = Saving(saver=Watched(), describe=described, every_steps=2 * job.cycle, at_end=False, stop_on_error=True,
                    told=told)  # fmt: skip
    built.engine.run([Ticks()], Progress(), saving)
    return clock.result()


def dcp_fsdp2(job: Job) -> dict:
    return _dcp(job, None)


def dcp_fsdp2_kept(job: Job) -> dict:
    """The same with a stager that keeps its memory from save to save, as dtrain does."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return _dcp(job, DefaultStager(StagingOptions(False, False, False, False)))


def _dcp(job: Job, stager) -> dict:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    model = _model(job)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    under_way: list = []

    def wait() -> None:
        while under_way:
            under_way.pop().result()

    clock = Clock(job, wait)
    for step in range(job.steps):
        _loss(job, model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        if clock.due:
            clock.save_begins()
            weights, state = get_state_dict(model, optimizer)
            future = dcp.async_save(
                {"model": weights, "optimizer": state}, checkpoint_id=clock.folder, process_group=group,
                async_checkpointer_type=dcp.state_dict_saver.AsyncCheckpointerType.THREAD, async_stager=stager,
            )  # fmt: skip
            clock.training_goes_on()
            future.add_done_callback(lambda _: clock.save_is_there())
            under_way.append(future)
    return clock.result()


def deepspeed_zero3(job: Job) -> dict:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel at start
    dist.init_process_group("gloo")
    model = _model(job)
    config = {
        "train_micro_batch_size_per_gpu": job.micro_batch, "gradient_clipping": 1.0, "zero_optimization": {"stage": 3},
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    clock = Clock(job, lambda: None)
    for step in range(job.steps):
        engine.backward(_loss(job, engine, step))
        engine.step()
        clock.tick()
        if clock.due:
            clock.save_begins()
            engine.save_checkpoint(str(clock.folder), tag=str(step))
            clock.training_goes_on()
            clock.save_is_there()
    return clock.result()


def _model(job: Job) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.assets), dtype=torch.float32).train()


def _loss(job: Job, model, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step * job.size + job.rank)
    tokens = torch.randint(0, 256, (job.micro_batch, job.length), generator=draw)
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _build(job: Job, strategy: str):
    from dtrain.comm import TorchComm
    from dtrain.config import frozen
    from dtrain.data.store import RowStore
    from dtrain.engine.build import build
    from dtrain.plan.world import World

    config = frozen.read(Path(job.config[strategy]), plugins=())
    world = World.from_env("cpu")
    comm = TorchComm(world)
    rows = (RowStore(Path(job.rows, "train.arrow")), RowStore(Path(job.rows, "eval.arrow")))
    return build(config, world, comm, assets=Path(job.assets), rows=rows, pad_id=job.pad_id), comm, config


WAYS = {way.__name__: way for way in (storage, dtrain_fsdp2, dcp_fsdp2, dcp_fsdp2_kept, dtrain_zero3, deepspeed_zero3)}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    torch.manual_seed(job.rank)
    Path(job.out, f"rank-{job.rank}.json").write_text(json.dumps(WAYS[job.way](job)))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch's process group and its users can wait for each other for ever in a teardown


if __name__ == "__main__":
    main()
