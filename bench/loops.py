"""What one rank does, one function for each way of training on the same rows. Started by throughput.py.

`python loops.py JOB.json`, with RANK and WORLD_SIZE as torchrun sets them. Imports what its own way needs and no more,
so that it also runs where dtrain is not installed. A step is one micro-batch on each rank: no way accumulates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


@dataclasses.dataclass(frozen=True)
class Job:
    way: str
    out: str
    """Where rank N writes `rank-N.json`."""
    model: str
    """A folder that transformers loads."""
    rows: str
    """npz: tokens, positions and labels, [rows, length], padded; the rows that are used, by their place here."""
    order: list[list[list[int]]]
    """Rows of each step and rank."""
    ids: dict[str, int]
    """Place in `rows` by the index in dtrain's store."""
    store: str
    """dtrain's rows."""
    config: dict[str, str]
    """dtrain's settled configuration, by strategy."""
    pad_id: int
    warmup: int
    steps: int
    """After the warm-up."""
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    profile: str | None = None
    """Where rank 0 writes a profile of the timed steps, as text; such a run is not timed."""

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    @property
    def size(self) -> int:
        return int(os.environ["WORLD_SIZE"])


class Clock:
    """When each step ended, what its loss was, and which tokens the model saw."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.seen: list[torch.Tensor] = []
        self.calls: list[int] = []
        self.losses: list[float] = []
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._profiler = None

    def watch(self, module: nn.Module) -> None:
        """Keep what the embedding is called with; costs a few microseconds, the same for everybody."""
        embedding = next(m for m in module.modules() if isinstance(m, nn.Embedding))
        embedding.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))

    def tick(self, loss: float) -> None:
        """A step is done; `loss` is this rank's part, of which the mean over ranks is the loss of the step."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.wall.append(time.perf_counter())
        self.cpu.append(used.ru_utime + used.ru_stime)
        self.calls.append(len(self.seen))
        self.losses.append(loss)
        if self._job.profile and self._job.rank == 0:
            self._profile(len(self.wall))

    def save(self) -> None:
        job, first, last = self._job, self._job.warmup - 1, self._job.warmup + self._job.steps - 1
        assert len(self.wall) == last + 1, (len(self.wall), last + 1)
        steps = [self.seen[start:end] for start, end in zip([0, *self.calls], self.calls, strict=False)]
        result = {
            "wall_s": self.wall[last] - self.wall[first],
            "step_s": np.diff(self.wall[first:]).tolist(),
            "cpu_s": self.cpu[last] - self.cpu[first],
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "losses": self.losses,
            "rows": [[_digest(step, job.pad_id)] for step in steps],
        }
        Path(job.out, f"rank-{job.rank}.json").write_text(json.dumps(result))

    def _profile(self, done: int) -> None:
        if done == self._job.warmup:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._profiler.__enter__()
        if done == self._job.warmup + self._job.steps:
            self._profiler.__exit__(None, None, None)
            table = self._profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            Path(self._job.profile).write_text(table)


def _digest(calls: list[torch.Tensor], pad_id: int) -> str:
    """Of a step's tokens on this rank without padding, one after the other: dtrain lays its rows end to end."""
    tokens = np.concatenate([tokens.detach().cpu().numpy().astype(np.int64).ravel() for tokens in calls])
    return hashlib.sha256(tokens[tokens != pad_id].tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- the bare loops: the floors


def bare_ddp(job: Job, clock: Clock) -> None:
    dist.init_process_group("gloo")
    model = _load(job, clock)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = _adamw(model, job)
    for batch in _batches(job):
        loss = ddp(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(loss.item())


def bare_ddp_head(job: Job, clock: Clock) -> None:
    """The same with dtrain's head in place of whole logits, and the fused optimizer: the strictest floor, against which
    all that is left is dtrain's loop."""
    dist.init_process_group("gloo")
    model = _load_with_head(job, clock)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = _adamw(model, job, fused=True)
    for inputs, num_targets in _dtrain_batches(job):
        loss = ddp(**inputs) / num_targets
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(loss.item())


def bare_fsdp2(job: Job, clock: Clock) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = _load(job, clock)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = _adamw(model, job)
    for batch in _batches(job):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(loss.item())


def bare_zero3(job: Job, clock: Clock) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel at start
    dist.init_process_group("gloo")
    model = _load(job, clock)
    config = {
        "train_micro_batch_size_per_gpu": len(job.order[0][0]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job.grad_clip,
        "zero_optimization": {"stage": 3},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_adamw(model, job), config=config, dist_init_required=False
    )
    for batch in _batches(job):
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        clock.tick(loss.item())


def _load(job: Job, clock: Clock) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    clock.watch(model)
    return model


def _load_with_head(job: Job, clock: Clock) -> nn.Module:
    from dtrain.models.hf import HF
    from dtrain.strategies.shared import materialise

    bundle = HF(path=job.model).build(Path(job.model), seed=0)
    materialise(bundle.module, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, param in bundle.module.named_parameters():
            param.view(-1).copy_(bundle.weights.read(name, 0, param.numel()))
    clock.watch(bundle.module)
    return bundle.module


def _adamw(model: nn.Module, job: Job, *, fused: bool | None = None) -> torch.optim.Optimizer:
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, fused=fused)


def _batches(job: Job) -> list[dict[str, torch.Tensor]]:
    """All of this rank's, made before the clock starts: the floor pays nothing for its data.

    The number of targets of the step is given, which costs nothing here and makes the loss that of one process.
    """
    rows = np.load(job.rows)
    batches = []
    for step in job.order:
        at = [[job.ids[str(i)] for i in mine] for mine in step]
        labels = [rows["labels"][mine] for mine in at]
        num_targets = sum(int((each[:, 1:] != -100).sum()) for each in labels)
        mine = at[job.rank]
        batches.append({
            "input_ids": torch.from_numpy(rows["tokens"][mine]),
            "position_ids": torch.from_numpy(rows["positions"][mine]),
            "labels": torch.from_numpy(labels[job.rank]),
            "num_items_in_batch": torch.tensor(num_targets / job.size),
        })  # fmt: skip
    return batches


def _dtrain_batches(job: Job) -> list[tuple[dict[str, torch.Tensor], float]]:
    from dtrain.data.collate import collate
    from dtrain.data.store import RowStore

    store, batches = RowStore(Path(job.store)), []
    for step in job.order:
        all_ranks = [collate([store.row(i) for i in mine], mine, job.pad_id) for mine in step]
        num_targets = sum(batch.num_targets for batch in all_ranks)
        batches.append((all_ranks[job.rank].inputs, num_targets / job.size))
    return batches


# ------------------------------------------------------------------------------------------------------------ dtrain


def dtrain_ddp(job: Job, clock: Clock) -> None:
    _dtrain(job, clock, "ddp", trackers=False)


def dtrain_ddp_trackers(job: Job, clock: Clock) -> None:
    """With the console and the metrics file, as `dtrain launch` has them."""
    _dtrain(job, clock, "ddp", trackers=True)


def dtrain_fsdp2(job: Job, clock: Clock) -> None:
    _dtrain(job, clock, "fsdp2", trackers=False)


def dtrain_zero3(job: Job, clock: Clock) -> None:
    _dtrain(job, clock, "zero3", trackers=False)


def _dtrain(job: Job, clock: Clock, strategy: str, *, trackers: bool) -> None:
    """As dtrain/engine/worker.py does it, with the clock as a tracker."""
    import gc

    gc.set_threshold(100_000, 50, 50)  # as `python -m dtrain` does

    from dtrain.comm import TorchComm
    from dtrain.config import frozen
    from dtrain.data.store import RowStore
    from dtrain.engine.build import build
    from dtrain.engine.state import Progress
    from dtrain.plan.world import World
    from dtrain.trackers.fan_out import FanOut

    config = frozen.read(Path(job.config[strategy]), plugins=())
    world = World.from_env("cpu")
    comm = TorchComm(world)
    store = Path(job.store)
    rows = (RowStore(store), RowStore(store.with_name("eval.arrow")))
    built = build(config, world, comm, assets=Path(job.model), rows=rows, pad_id=job.pad_id)
    clock.watch(built.bundle.module)
    specs = config.tracker.values() if trackers and job.rank == 0 else ()
    all_trackers = FanOut(spec.build(Path(job.out), frozen.to_plain(config), sys.stdout) for spec in specs)
    all_trackers.start(steps=len(job.order), first_step=0, lines=built.lines)
    built.engine.run([all_trackers, _Ticks(clock)], Progress())


class _Ticks:
    """A tracker that only says when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def step(self, report) -> None:
        self._clock.tick(report.loss)

    def eval(self, report) -> None: ...

    def note(self, line: str) -> None: ...


# ------------------------------------------------------------------------------------------- what others would use


def hf_trainer(job: Job, clock: Clock) -> None:
    from transformers import Trainer, TrainingArguments

    trainer = _timed(Trainer, clock)(
        model=_load(job, clock), args=TrainingArguments(**_arguments(job)), train_dataset=_Rows(job),
        data_collator=_stack, callbacks=[_callback(clock)],
    )  # fmt: skip
    clock.trainer = trainer
    trainer.train()


def trl_sft(job: Job, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = _Rows(job)
    dataset = Dataset.from_dict({key: [rows[i][key] for i in range(len(rows))] for key in rows[0]})
    args = SFTConfig(
        **_arguments(job), gradient_checkpointing=False, bf16=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    trainer = _timed(SFTTrainer, clock)(
        model=_load(job, clock), args=args, train_dataset=dataset, data_collator=_stack,
        processing_class=AutoTokenizer.from_pretrained(job.model), callbacks=[_callback(clock)],
    )  # fmt: skip
    clock.trainer = trainer
    trainer.train()


def _arguments(job: Job) -> dict:
    """A default that would cost a peer time for nothing is set well; the optimizer is its own choice (fused)."""
    return {
        "output_dir": job.out, "use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False,
        "per_device_train_batch_size": len(job.order[0][0]), "max_steps": len(job.order), "learning_rate": job.lr,
        "lr_scheduler_type": "constant", "adam_beta1": job.betas[0], "adam_beta2": job.betas[1],
        "weight_decay": job.weight_decay, "max_grad_norm": job.grad_clip, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def _timed(base: type, clock: Clock) -> type:
    class Timed(base):
        def training_step(self, *args, **kwargs):
            clock.loss = super().training_step(*args, **kwargs)
            return clock.loss

    return Timed


def _callback(clock: Clock):
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick(float(clock.loss))

    return Ticks()


class _Rows(torch.utils.data.Dataset):
    """In the order that gives each rank of accelerate's sequential loader the rows of `order`."""

    def __init__(self, job: Job) -> None:
        rows = np.load(job.rows)
        names = {"input_ids": "tokens", "position_ids": "positions", "labels": "labels"}
        self._columns = {key: rows[name] for key, name in names.items()}
        self._order = [job.ids[str(i)] for step in job.order for mine in step for i in mine]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict:
        return {key: column[self._order[i]] for key, column in self._columns.items()}


def _stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.stack([np.asarray(row[key]) for row in rows])) for key in rows[0]}


WAYS = {
    way.__name__: way
    for way in (bare_ddp, bare_ddp_head, bare_fsdp2, bare_zero3, dtrain_ddp, dtrain_ddp_trackers, dtrain_fsdp2,
                dtrain_zero3, hf_trainer, trl_sft)
}  # fmt: skip


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = Clock(job)
    WAYS[job.way](job, clock)
    clock.save()
    sys.stdout.flush()
    os._exit(0)  # the other rank may still be using the process group's store


if __name__ == "__main__":
    main()
