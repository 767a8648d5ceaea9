"""The loop. It reads like what it does; every number in it was settled by the plan."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from typing import TYPE_CHECKING, final

import torch

from dtrain.data.loader import Loader, eval_windows
from dtrain.engine.evaluate import evaluate
from dtrain.engine.step import Objective, StepResult, train_step
from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.comm import AbstractComm
    from dtrain.config.spec import ScheduleSpec
    from dtrain.data.store import RowStore
    from dtrain.engine.state import Progress
    from dtrain.plan.batch import BatchPlan
    from dtrain.strategies.base import AbstractStrategy


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
    flops_per_token: float
    peak_flops: float | None
    """Of one device, dense; None where unknown."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    first_loss: float
    last_loss: float
    eval_loss: float | None
    steps: int


@final
class Engine:
    def __init__(self, course: Course, strategy: AbstractStrategy, objective: Objective, comm: AbstractComm,
                 rows: tuple[RowStore, RowStore]) -> None:  # fmt: skip
        self._course, self._strategy, self._objective, self._comm = course, strategy, objective, comm
        self._train_rows, self._eval_rows = rows

    def run(self, trackers: Sequence[AbstractTracker], progress: Progress) -> Result:
        """Train to the end, with evals on the way and after the last step. Collective."""
        course = self._course
        loader = Loader(self._train_rows, course.batch, rank=self._comm.rank, seed=course.seed, pad_id=course.pad_id)
        reports: list[StepReport] = []
        eval_loss = None
        for step in range(course.steps):
            progress.phase, progress.step = "train", step
            began = time.perf_counter()
            batches = loader.window(step)
            data_s = time.perf_counter() - began
            lr = course.lr * course.schedule.factor(step, course.steps)
            result = train_step(batches, self._strategy, self._objective, self._comm, lr=lr)
            report = self._report(step, lr, result, began, data_s, loader)
            reports = [*reports[:1], report]
            for tracker in trackers:
                tracker.step(report)
                if result.skipped:
                    tracker.note(
                        f"step {step + 1}: gradients overflowed in fp16; nothing was updated, the loss scale is lowered"
                    )
            last = step + 1 == course.steps
            if last or (course.eval_every and (step + 1) % course.eval_every == 0):
                eval_loss = self._eval(step + 1, trackers, progress)
        return Result(reports[0].loss, reports[-1].loss, eval_loss, course.steps)

    def _eval(self, step: int, trackers: Sequence[AbstractTracker], progress: Progress) -> float | None:
        """None where nothing was held out."""
        if not len(self._eval_rows):
            return None
        progress.phase, progress.step = "eval", step
        began = time.perf_counter()
        windows = eval_windows(self._eval_rows, self._course.batch, rank=self._comm.rank, pad_id=self._course.pad_id,
                               max_rows=self._course.eval_max_rows)  # fmt: skip
        loss, num_targets = evaluate(windows, self._strategy, self._objective, self._comm)
        report = EvalReport(step, loss, num_targets, time.perf_counter() - began)
        for tracker in trackers:
            tracker.eval(report)
        return loss

    def _report(self, step: int, lr: float, result: StepResult, began: float, data_s: float,
                loader: Loader) -> StepReport:  # fmt: skip
        """Collective: one max."""
        course, size = self._course, self._comm.size
        mem_bytes, data_s = self._comm.max([_memory(self._comm.device), data_s])
        step_s = time.perf_counter() - began
        tokens_per_s = result.num_tokens / step_s
        mfu = course.flops_per_token * tokens_per_s / (course.peak_flops * size) if course.peak_flops else None
        return StepReport(
            step=step + 1, loss=result.loss, grad_norm=result.grad_norm, lr=lr, num_targets=result.num_targets,
            tokens=result.num_tokens, tokens_per_s=tokens_per_s, step_s=step_s, data_s=data_s, mfu=mfu,
            mem_bytes=int(mem_bytes), epoch=loader.epoch(step + 1), samples=(step + 1) * course.batch.global_batch,
            extras=result.extras,
        )  # fmt: skip


def _memory(device: torch.device) -> int:
    """Peak bytes of this process: of the device's allocator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
