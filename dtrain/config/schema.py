"""The closed schema of a run: every key that there is, its type and its default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.asked import Asked, RowError, asked, read
from dtrain.config.compose import clip
from dtrain.config.spec import (
    DatasetSpec,
    LauncherSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    ScheduleSpec,
    StrategySpec,
    TemplateSpec,
    TrackerSpec,
    TuningSpec,
    spec,
)

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._=,+@ -]{0,198}[A-Za-z0-9._=,+@-])?")
Positive = Annotated[int, Field(ge=1)]


def seconds(text: str) -> float | None:
    """Of a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?:\.\d+)?)(?::(\d\d?))?(?::(\d\d?))?", text.strip())
    if match is None:
        return None
    days, first, second, third = (float(part) if part else None for part in match.groups())
    if days is not None:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        total = days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        total = (first or 0) * 3600 + (second or 0) * 60 + third
    else:
        total = (first or 0) * 60 + (second or 0)
    return total or None


@spec
class Run:
    name: str = "demo"
    """Name of the run; its folder is `run.dir/run.name`."""
    dir: str = "runs"
    """Where run folders are; relative to where you type the command. All nodes must see it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of fresh weights, sample order and dropout."""
    time_limit: str | None = None
    """How long the run may take, as hours:minutes:seconds or minutes: it saves and stops before (exit code 75), and the
    same command goes on. Counted from the start of each attempt."""
    hang_after: Literal["auto", "off"] | Annotated[float, Field(gt=0)] = "auto"
    """Seconds after which ranks that do not get on in a step, an eval or a save are ended, with their stacks in the run
    folder; `auto` learns from this run how long each takes, and is never below 300."""
    cache: str | None = None
    """Where prepared data and tokenizers are kept; `run.dir/.cache` when not given."""

    def problems(self) -> list[str]:
        found = [f"run.{key}: empty; name a folder" for key in ("dir", "cache") if getattr(self, key) == ""]
        if not _NAME.fullmatch(self.name):
            found.append(f"run.name={clip(self.name)}: the name of a folder is made of letters, digits and . _ = , + @ "
                         f"- and spaces, begins with a letter or digit, and has at most 200 characters; run.dir says "
                         f"where it is")  # fmt: skip
        return found


@spec
class Train:
    steps: Positive | None = None
    """Optimizer steps; give this or `train.epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows, as an alternative to `train.steps`."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """Of forward and backward; master weights, gradient sums and optimizer state are fp32 in each. `auto` is bf16 on
    CUDA and fp32 on CPU. fp16 needs CUDA."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 is off."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: far less memory, about a third more time."""
    unmoved: Literal["refuse", "allow"] = "refuse"
    """Whether a run may go on whose first step gave a parameter that is to be trained no gradient, or changed one that
    is not."""
    compare_every: Annotated[int, Field(ge=0)] = 100
    """Steps between two comparisons, bit by bit, of what several ranks hold a copy of: weights and optimizer state in
    DDP and between replicas, and weights that are not trained. Done before each save too; 0 is never."""
    max_leap: Annotated[float, Field(gt=0)] | None = None
    """End the run before the update of a step whose loss is more than so much above the mean of the 32 steps before,
    which takes 8 to be one; null is never."""
    leave_out: tuple[Positive, ...] = ()
    """Steps, as trackers number them, whose rows are taken and not learned from: those of a leap."""
    on_oom: Literal["stop", "smaller_micro_batch"] = "stop"
    """Where memory runs out in a step: end the run, or do that step again in micro-batches of half the size, and go on
    with those. The global batch stays as it is."""

    def problems(self) -> list[str]:
        if self.steps is not None and self.epochs is not None:
            return [f"train.steps={self.steps} and train.epochs={self.epochs:g}: one number says how long to train; "
                    f"set the other to null"]  # fmt: skip
        if self.steps is None and self.epochs is None:
            return ["train.steps: not given, and train.epochs neither; set one of them"]
        if self.steps is not None and (beyond := [step for step in self.leave_out if step > self.steps]):
            return [f"train.leave_out={beyond}: beyond train.steps={self.steps}; name steps of the run"]
        if len(set(self.leave_out)) == self.steps:
            return [f"train.leave_out: all of train.steps={self.steps}, which leaves nothing to learn; name fewer"]
        return []


@spec
class Batch:
    global_batch: Positive | Literal["auto"] | None = None
    """Samples that one optimizer step sees over all ranks, whatever their number; `auto` is 16, or all rows where there
    are fewer."""
    global_tokens: Positive | None = None
    """The same in tokens, for packed rows: a multiple of dataset.max_length."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """The most samples of one forward on one rank; `auto` is the largest that fits by the memory formula."""

    def problems(self) -> list[str]:
        if self.global_batch is not None and self.global_tokens is not None:
            return [f"batch.global_batch={self.global_batch} and batch.global_tokens={self.global_tokens}: one number "
                    f"says how large a step is; set the other to null"]  # fmt: skip
        if self.global_batch is None and self.global_tokens is None:
            return ["batch.global_batch: not given, and batch.global_tokens neither; set one of them"]
        return []


@spec
class Eval:
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate on the held-out rows each so many steps, and at the end; 0 is at the end only."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the documents that is held out, chosen by a hash of their content; 0 is no eval."""
    max_rows: Positive | None = None
    """Evaluate on the first so many held-out rows; all of them when not given."""
    prompts: tuple[str | dict[str, Any], ...] = ()
    """What the model goes on with at the same steps, by its likeliest tokens, to be read beside the curve: texts, or
    conversations as {messages: [...]}."""
    prompts_file: str | None = None
    """More of them: a file with {"prompt": ...} or {"messages": [...]} on each line."""
    chat: bool = False
    """A prompt is what a user says: the chat template is put around it."""
    max_new_tokens: Positive = 64
    """The most tokens of what the model goes on with."""

    def problems(self) -> list[str]:
        found = ["eval.prompts_file: empty; name a file, or null"] if self.prompts_file == "" else []
        for one in self.prompts:
            try:
                asked("", {"prompt": one} if isinstance(one, str) else one, chat=self.chat)
            except RowError as error:
                found.append(f"eval.prompts: {clip(repr(one))}: {error}")
        return found

    def settled(self) -> Eval:
        """With what lies in a file read in, so that all ranks and later starts have the same. Raises DataError."""
        if self.prompts_file is None:
            return self
        rows = read(Path(self.prompts_file), chat=self.chat, option="eval.prompts_file=")
        return dataclasses.replace(self, prompts=(*self.prompts, *(dict(one.row) for one in rows)), prompts_file=None)

    def asked(self) -> list[Asked]:
        """The prompts, each with its place among them."""
        return [asked(f"eval.prompts[{i}]", {"prompt": one} if isinstance(one, str) else one, chat=self.chat)
                for i, one in enumerate(self.prompts)]  # fmt: skip


@spec
class Checkpoint:
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Save each so many steps; 0 is not by steps."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 15.0
    """Save each so many minutes; null is not by time."""
    at_end: bool = True
    """Save after the last step too, so that the run can be gone on with."""
    asynchronous: bool = True
    """Training waits only for the copy to host memory, and goes on while that is written."""
    keep_last: Positive = 2
    """The newest so many checkpoints stay; older ones are removed once a newer one is complete."""
    keep_every: Positive | None = None
    """Checkpoints of each so many steps stay for good."""
    best_by: str | None = None
    """The checkpoint with the best of this metric stays: loss, eval_loss, or one of the objective's."""
    best_mode: Literal["min", "max"] = "min"
    """Whether less or more of `best_by` is better."""
    on_error: Literal["stop", "warn"] = "stop"
    """What a save that fails does: end the run, or say so and go on; the checkpoints before it stay in each case."""

    spelled: ClassVar[Mapping[str, str]] = {"async": "asynchronous"}
    """Keys that Python cannot have as names, and the fields they mean."""

    def problems(self) -> list[str]:
        if self.best_by == "":
            return ["checkpoint.best_by: empty; name a metric, such as eval_loss, or null"]
        return []


@spec
class Resume:
    path: str | None = None
    """A checkpoint, or a run's folder, to start this run from; `resume=PATH` for short. Once the run has checkpoints of
    its own, it goes on from those."""
    allow: tuple[str, ...] = ()
    """Differences from the checkpoint to accept: keys as `optim.lr` or whole groups as `optim`, `data`, `model`."""

    def problems(self) -> list[str]:
        return ["resume.path: empty; name a checkpoint or a run's folder, or null"] if self.path == "" else []


@spec
class Export:
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the exported weights; `auto` is the precision of the training."""
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest safetensors file, in 10^9 bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, valid part by part. Made by `validate`, and by nothing else."""

    model: ModelSpec
    dataset: DatasetSpec
    template: TemplateSpec
    objective: ObjectiveSpec
    tuning: TuningSpec
    strategy: StrategySpec
    optim: OptimSpec
    schedule: ScheduleSpec
    launcher: LauncherSpec
    tracker: dict[str, TrackerSpec]
    run: Run
    train: Train
    batch: Batch
    eval: Eval
    checkpoint: Checkpoint
    resume: Resume
    export: Export
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; `auto` is CUDA where a GPU is visible."""
    device_memory_gb: float | None = None
    """Memory of one device in GiB, to plan for a machine that is not this one; found out when not given."""
    plugins: tuple[str, ...] = ()
    """Your own packages that `_target_` may name; only what is typed on the command line counts."""
