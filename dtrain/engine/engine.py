"""The loop. It reads like what it does; every number in it was settled by the plan."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from typing import TYPE_CHECKING, final

import torch

from dtrain.checkpoint.saver import AbstractSaver, NoSaver, Saved
from dtrain.data.collate import collate
from dtrain.data.loader import AbstractLoader, Collate, eval_windows, load
from dtrain.engine import rng
from dtrain.engine.control import Control, why
from dtrain.engine.evaluate import evaluate
from dtrain.engine.rescue import NO_RESCUE, AbstractRescue
from dtrain.engine.samples import ToldToStop
from dtrain.engine.state import State
from dtrain.engine.step import Limit, Objective, StepResult, train_step
from dtrain.errors import DivergedError, LeapError, NonFiniteError, StorageError
from dtrain.failpoints import reach
from dtrain.trackers.base import AbstractTracker, Confusion, EvalReport, SamplesReport, StepReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from dtrain.checkpoint.manifest import Manifest
    from dtrain.comm import AbstractComm
    from dtrain.config.spec import ScheduleSpec
    from dtrain.data.batch import Batch
    from dtrain.data.store import AbstractStore
    from dtrain.data.streaming import Streams
    from dtrain.engine.proof import Proof
    from dtrain.engine.replicas import Replicas
    from dtrain.engine.samples import Sampler
    from dtrain.engine.state import Progress
    from dtrain.models.base import AbstractAlongside
    from dtrain.objectives.base import Before, Loss
    from dtrain.plan.batch import BatchPlan
    from dtrain.strategies.base import AbstractStrategy

    Metrics = Callable[[Mapping[str, Sequence[float]], int], Mapping[str, float]]
    Counts = Callable[[Mapping[str, Sequence[float]]], tuple[Sequence[str], Sequence[Sequence[int]]] | None]
    Begin = Callable[[Callable[[str], None], Callable[[Sequence[int]], None]], Before | None]


LEAST_RECENT, MOST_RECENT = 8, 32
"""Steps whose mean loss a leap is told by."""


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """What the loop follows."""

    steps: int
    lr: float
    """Peak; the schedule multiplies it."""
    schedule: ScheduleSpec
    batch: BatchPlan
    seed: int
    pad_id: int
    eval_every: int
    """Steps between evals; 0 is only at the end."""
    eval_max_rows: int | None
    compare_every: int
    """Steps between comparisons of what several ranks hold; 0 is never."""
    max_leap: float | None
    """How far the loss of a step that is updated by may be above the mean of those before it."""
    leave_out: frozenset[int]
    """Steps, counted from 1, whose rows are not learned from."""
    flops_per_token: float
    peak_flops: float | None
    """Of one device, dense; None where unknown."""
    collate: Collate = collate
    metrics: Metrics = lambda sums, num_targets: {}
    """What to tell of an eval besides its loss, of the sums of what the objective found."""
    confusion: Counts = lambda sums: None
    """Labels, and how often each was taken for each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Saving:
    """When and with what the loop saves."""

    saver: AbstractSaver
    describe: Callable[[State, dict[str, float]], Manifest]
    """What a checkpoint says of itself, but for its files; of the state and the metrics of its step."""
    every_steps: int
    at_end: bool
    stop_on_error: bool
    guess_s: float = 0.0
    """What a save may take, until one was made: the time limit is kept by it."""
    told: Callable[[Saved], None] = lambda saved: None
    """Hears on every rank what became of each save."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    state: State
    stopped: str | None = None
    """Why it ended before its last step; None where it did not."""


@final
class Engine:
    def __init__(  # noqa: PLR0913 - all that is live comes together here
                 self, course: Course, strategy: AbstractStrategy, objective: Objective, comm: AbstractComm,
                 rows: tuple[AbstractStore | Streams, AbstractStore], *, state: State | None = None,
                 begin: Begin = lambda say, at: None, proof: Proof | None = None,
                 alongside: AbstractAlongside | None = None, sampler: Sampler | None = None,
                 replicas: Replicas | None = None) -> None:  # fmt: skip
        """`state`: where to go on from; `begin` is called before the first step, and makes what sees the micro-batches
        of each before their losses; `alongside`: what the tuning does besides; `sampler`: writes at each eval;
        `replicas`: compares ranks.
        """
        self._alongside, self._sampler, self._replicas = alongside, sampler, replicas
        self._compared_step = -1
        self._proof, self._moved = proof, state is not None and state.step > 0
        self._course, self._strategy, self._objective, self._comm = course, strategy, objective, comm
        self._train_rows, self._eval_rows = rows
        self._state = state or State()
        self._begin = begin
        self._saved_step = self._state.step
        """Of the last checkpoint, or the one that this began with."""
        self._measured: Mapping[str, float] = {}
        """By the objective, in the last eval."""
        self._stop = 0
        self._save_due = self._busy = False
        self._step_s = self._save_s = 0.0

    def run(self, trackers: Sequence[AbstractTracker], progress: Progress, saving: Saving | None = None,
            control: Control | None = None, rescue: AbstractRescue = NO_RESCUE) -> Result:  # fmt: skip
        """Train to the end, with evals and saves on the way and at the end, or until asked to stop. Collective."""
        self._trackers, self._progress = trackers, progress
        self._saving, self._control, self._rescue = saving, control or Control(), rescue
        self._saver = saving.saver if saving else NoSaver()
        self._save_s = saving.guess_s if saving else 0.0
        course = self._course
        self._loader = loader = load(
            self._train_rows, course.batch, rank=self._comm.rank, seed=course.seed, pad_id=course.pad_id,
            collate=course.collate, samples=self._state.samples, state=self._state.stream,
            alive=lambda: progress.at("data"),
        )  # fmt: skip
        if loader.line:
            self._note(loader.line)
        learned = {step for step in course.leave_out if step <= self._state.step}.difference(self._state.left_out)
        if learned:
            self._note(f"train.leave_out={sorted(learned)}: learned from before step {self._state.step}, where this "
                       f"goes on; to leave them out, go on from a checkpoint before them")  # fmt: skip
        self._before = self._begin(self._note, lambda ids: progress.at("begin", rows=ids))
        self._agree()
        try:
            self._look_if_due()
            while self._state.step < course.steps and not self._stop:
                if self._state.step + 1 in course.leave_out:
                    self._leave_out(loader)
                else:
                    self._train_one(loader)
                if not self._saver.failed:  # of a failure all ranks must hear at the same step
                    self._hear(self._saver.finished())
                self._compare_if_due()
                self._look_if_due()
                self._save_if_due()
        except (NonFiniteError, LeapError, DivergedError):  # on all ranks
            self._saver.wait()  # what is being written is of an earlier step, and good
            raise
        if self._stop or (saving and saving.at_end):
            self._save()
        self._hear_all()
        rescue.end()
        if self._proof:
            self._proof.kept()
        self._state = dataclasses.replace(self._state, stream=loader.gathered(self._state.samples, self._comm))
        loader.close()
        left = self._state.step < course.steps or self._eval_due() or self._samples_due()
        return Result(self._state, why(self._stop) if self._stop and left else None)

    def _leave_out(self, loader: AbstractLoader) -> None:
        """Take the rows of a step, and learn nothing from them. Collective."""
        state = self._state
        self._progress.at("data", state.step)
        loader.window(state.samples)
        num = self._course.batch.global_batch
        self._state = dataclasses.replace(state, step=state.step + 1, samples=state.samples + num,
                                          left_out=(*state.left_out, state.step + 1))  # fmt: skip
        self._note(f"step {state.step + 1}: left out, as train.leave_out says; nothing is learned from its {num} rows")
        self._agree()

    def _limit(self) -> Limit | None:
        """Of the loss of the next step; None where any is taken."""
        leap, recent = self._course.max_leap, self._state.recent
        if leap is None or len(recent) < LEAST_RECENT:
            return None
        mean, step = math.fsum(recent) / len(recent), self._state.step + 1
        left_out = ",".join(map(str, sorted({*self._course.leave_out, step})))
        return Limit(mean + leap, f"more than train.max_leap={leap:g} above {mean:.4f}, the mean of the {len(recent)} "
                     f"steps before; the same command with train.leave_out=[{left_out}] goes on without the rows of "
                     f"step {step}")  # fmt: skip

    def _train_one(self, loader: AbstractLoader) -> None:
        course, state = self._course, self._state
        self._progress.at("data", state.step)
        began = time.perf_counter()
        batches = loader.window(state.samples)
        data_s = time.perf_counter() - began
        self._progress.at("train")
        lr = course.lr * course.schedule.factor(state.step, course.steps)
        drawn = rng.save(self._comm.device) if self._rescue is not NO_RESCUE else {}
        self._rescue.begin(state.step, lambda: self._keep(drawn))
        alongside = self._alongside
        if alongside:
            alongside.begin(state.step + 1, course.steps)
        try:
            result = train_step(
                batches, self._strategy, self._forward, self._comm, step=state.step, lr=lr, before=self._before,
                updating=self._rescue.updating, limit=self._limit(), term=alongside.term if alongside else None,
            )  # fmt: skip
            if alongside and alongside.after(state.step + 1, course.steps, self._strategy.shards, self._comm):
                self._strategy.refresh()
        except Exception as error:
            self._rescue.failed(error)
            raise
        if self._proof and not self._moved and not result.skipped:
            self._proof.moved()
            self._moved = True
        self._state = state = dataclasses.replace(
            state, step=state.step + 1, samples=state.samples + course.batch.global_batch,
            tokens=state.tokens + result.num_tokens, targets=state.targets + result.num_targets,
            first_loss=result.loss if state.first_loss is None else state.first_loss, last_loss=result.loss,
            recent=() if course.max_leap is None else (*state.recent, result.loss)[-MOST_RECENT:],
        )  # fmt: skip
        report = self._report(lr, result, began, data_s, loader)
        for tracker in self._trackers:
            tracker.step(report)
            if result.skipped:
                tracker.note(
                    f"step {state.step}: gradients overflowed in fp16; nothing was updated, the loss scale is lowered"
                )

    def _compare_if_due(self) -> None:
        every = self._course.compare_every
        if every and self._state.step % every == 0:
            self._compare()

    def _compare(self) -> None:
        """Unless this very step was looked at. Collective."""
        if self._replicas is not None and self._compared_step != self._state.step:
            self._replicas.check(self._state.step)
            self._compared_step = self._state.step

    def _forward(self, module: nn.Module, batch: Batch) -> Loss:
        self._progress.at(self._progress.phase, rows=batch.sample_ids)
        reach(f"{self._progress.phase}.forward")
        loss = self._objective(module, batch)
        reach(f"{self._progress.phase}.backward")
        return loss

    def _agree(self, *values: float) -> list[float]:
        """The largest of each value on any rank; and by the same word, whether to stop or save. Collective: one max.

        Every rank decides by what all have said, so that none saves or stops alone.
        """
        stop = self._control.stop(step_s=self._step_s, save_s=self._save_s)
        mine = [stop, self._control.save(), self._saver.busy, self._saver.failed]
        *most, stop_f, save, busy, failed = self._comm.max([*values, *mine])
        self._stop = self._stop or int(stop_f)
        self._save_due = self._save_due or bool(save)
        self._busy = bool(busy)
        if failed:
            self._hear_all()
        return most

    def _look_due(self) -> bool:
        step, every = self._state.step, self._course.eval_every
        return step == self._course.steps or bool(every and step and step % every == 0)

    def _eval_due(self) -> bool:
        return self._look_due() and self._state.eval_step != self._state.step and len(self._eval_rows) > 0

    def _samples_due(self) -> bool:
        return self._look_due() and self._state.sample_step != self._state.step and self._sampler is not None

    def _look_if_due(self) -> None:
        """At the held-out rows, and at what the model writes. Collective."""
        if self._eval_due() and not self._stop:
            self._eval()
        if self._samples_due() and not self._stop:
            self._sample()

    def _eval(self) -> None:
        self._progress.at("eval", self._state.step)
        began = time.perf_counter()
        windows = eval_windows(self._eval_rows, self._course.batch, rank=self._comm.rank, pad_id=self._course.pad_id,
                               max_rows=self._course.eval_max_rows, collate=self._course.collate)  # fmt: skip
        found = evaluate(windows, self._strategy, self._forward, self._comm, stop=self._asked_to_stop,
                         before=self._before)  # fmt: skip
        if found is None:  # it is looked at again when the run goes on
            return
        metrics = self._course.metrics(found.sums, found.num_targets)
        counts = self._course.confusion(found.sums)
        report = EvalReport(self._state.step, found.loss, found.num_targets, time.perf_counter() - began, metrics,
                            None if counts is None else Confusion(*counts))  # fmt: skip
        self._state = dataclasses.replace(self._state, eval_step=report.step, eval_loss=report.loss)
        self._measured = metrics
        for tracker in self._trackers:
            tracker.eval(report)

    def _sample(self) -> None:
        assert self._sampler is not None
        self._progress.at("eval", self._state.step)
        began = time.perf_counter()
        samples = self._sampler.write(self._go_on)
        if samples is None:  # all of them are written when the run goes on
            return
        report = SamplesReport(self._state.step, samples, time.perf_counter() - began)
        self._state = dataclasses.replace(self._state, sample_step=report.step)
        for tracker in self._trackers:
            tracker.samples(report)

    def _go_on(self, left: int) -> bool:
        """Collective."""
        self._progress.at("eval")
        (most,) = self._agree(left)
        if self._stop:
            raise ToldToStop
        return most > 0

    def _asked_to_stop(self) -> bool:
        """Collective."""
        self._agree()
        return bool(self._stop)

    def _save_if_due(self) -> None:
        saving = self._saving
        if saving is None or self._stop:
            return
        due = saving.every_steps and self._state.step % saving.every_steps == 0
        if due and self._busy:
            self._note(f"step {self._state.step}: the last save is still being written; this one follows it")
        self._save_due = self._save_due or bool(due)
        if self._save_due and not self._busy:
            self._save()

    def _save(self) -> None:
        """Unless this very step is saved, which shows when the last save is over. Collective."""
        self._hear_all()
        if self._saving is None or self._saved_step == self._state.step:
            return
        self._progress.at("save", self._state.step)
        self._compare()
        blobs = {**rng.save(self._comm.device), **self._loader.blobs(self._state.samples)}
        self._saver.save(self._strategy.shards(), self._described(self._saving), blobs)
        self._saved_step, self._save_due = self._state.step, False
        self._control.saved()

    def _described(self, saving: Saving) -> Manifest:
        state, measured = self._state, {}
        losses = {} if state.last_loss is None else {"loss": state.last_loss}
        if state.eval_step == state.step and state.eval_loss is not None:
            losses["eval_loss"], measured = state.eval_loss, dict(self._measured)
        state = dataclasses.replace(state, consumed=self._loader.consumed(state.samples),
                                    stream=self._loader.state(state.samples))  # fmt: skip
        return saving.describe(state, {**losses, **measured, **losses})

    def _keep(self, drawn: Mapping[str, bytes]) -> None:
        """Save the state that the step began with, from whatever thread; `drawn` is that of the random generators."""
        self._progress.pulse("write", self._state.step, ())
        self._saver.wait()
        if self._saving is not None and self._saved_step != self._state.step:
            blobs = {**drawn, **self._loader.blobs(self._state.samples)}
            self._saver.save_apart(self._strategy.shards(), self._described(self._saving), blobs)
        saved = self._saver.finished()
        if saved is not None and self._saving is not None:
            self._note(saved.line())
            self._saving.told(saved)

    def _hear_all(self) -> None:
        """Collective."""
        self._progress.at("write")
        self._saver.wait()
        self._hear(self._saver.finished())

    def _hear(self, saved: Saved | None) -> None:
        """Tell what became of a save. Where it failed, all ranks raise StorageError, or note it."""
        if saved is None:
            return
        self._save_s = saved.write_s
        self._note(saved.line())
        assert self._saving is not None
        self._saving.told(saved)
        if saved.error is None:
            return
        self._saved_step = -1
        if self._saving.stop_on_error:
            raise StorageError(f"{saved.line()}; the checkpoints before it are whole. checkpoint.on_error=warn goes on")

    def _note(self, line: str) -> None:
        for tracker in self._trackers:
            tracker.note(line)

    def _report(self, lr: float, result: StepResult, began: float, data_s: float, loader: AbstractLoader) -> StepReport:
        """Collective: one max."""
        course, state = self._course, self._state
        mem_bytes, data_s, step_s = self._agree(_memory(self._comm.device), data_s, time.perf_counter() - began)
        self._step_s = step_s
        tokens_per_s = result.num_tokens / step_s
        peak = course.peak_flops and course.peak_flops * self._comm.size
        return StepReport(
            step=state.step, loss=result.loss, grad_norm=result.grad_norm, lr=lr, num_targets=result.num_targets,
            tokens=result.num_tokens, tokens_per_s=tokens_per_s, step_s=step_s, data_s=data_s,
            mfu=course.flops_per_token * tokens_per_s / peak if peak else None, mem_bytes=int(mem_bytes),
            epoch=loader.epoch(state.samples), samples=state.samples, extras=result.extras,
        )  # fmt: skip


def _memory(device: torch.device) -> int:
    """Peak bytes of this process: of the device's allocator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
