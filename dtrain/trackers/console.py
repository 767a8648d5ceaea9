"""What the user sees: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, final

from pydantic import Field

from dtrain.config.spec import TrackerSpec, spec
from dtrain.trackers._words import count, duration, size
from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport

QUIET_S = 60.0
"""With `auto`, a plain line comes at least this often."""


@spec
class Console(TrackerSpec):
    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """A plain line each so many steps; auto: some twenty a run, and one a minute in long runs."""
    live: bool = True
    """Show a bar where the stream is a terminal."""

    def build(self, run_dir: Path, config: Mapping[str, Any], stream: TextIO) -> AbstractTracker:
        if self.live and stream.isatty():
            from dtrain.trackers._bar import Bar

            return Bar(stream)
        return Lines(stream, self.every_steps)


class Eta:
    """Time left, from the pace of the steps so far without the slow first one."""

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps, self._from = steps, first_step
        self._began: float | None = None

    def after(self, step: int) -> float | None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._from = now, step
            return None
        done = step - self._from
        return (now - self._began) / done * (self.steps - step) if done > 0 else None


def figures(report: StepReport) -> str:
    parts = [
        f"loss {report.loss:.4f}",
        f"grad {report.grad_norm:.2f}",
        f"lr {report.lr:.2e}",
        f"{count(report.tokens_per_s)} tok/s",
        f"mfu {report.mfu:.1%}" if report.mfu is not None else "",
        size(report.mem_bytes),
    ]
    return "  ".join(part for part in parts if part)


def eval_line(report: EvalReport) -> str:
    extras = "".join(f"  {name} {value:.4g}" for name, value in report.extras.items())
    return f"eval at step {report.step}  loss {report.loss:.4f}{extras}  ({duration(report.eval_s)})"


def last_line(outcome: str, last: StepReport | None, seconds: float) -> str:
    at = f" at step {last.step}, loss {last.loss:.4f}" if last is not None else ""
    return f"{outcome}{at}, after {duration(seconds)}"


@final
class Lines(AbstractTracker):
    """One line of text now and then; for files, pipes and CI."""

    def __init__(self, stream: TextIO, every_steps: int | Literal["auto"]) -> None:
        self._stream, self._wanted = stream, every_steps
        self._every = 1
        self._began = self._printed = time.monotonic()
        self._last: StepReport | None = None
        self._eta = Eta(0, 0)
        self._first = 1

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        self._every = max(1, round((steps - first_step) / 20)) if self._wanted == "auto" else self._wanted
        self._eta = Eta(steps, first_step)
        self._first = first_step + 1
        self._began = self._printed = time.monotonic()
        for line in lines:
            self.note(line)

    def step(self, report: StepReport) -> None:
        self._last = report
        left = self._eta.after(report.step)
        now = time.monotonic()
        long_ago = self._wanted == "auto" and now - self._printed >= QUIET_S
        if report.step in (self._first, self._eta.steps) or report.step % self._every == 0 or long_ago:
            self._printed = now
            eta = f"  {duration(left)} left" if left is not None and report.step < self._eta.steps else ""
            width = len(str(self._eta.steps))
            self.note(f"step {report.step:>{width}}/{self._eta.steps}  {figures(report)}{eta}")

    def eval(self, report: EvalReport) -> None:
        self.note(eval_line(report))

    def note(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def finish(self, *, outcome: str) -> None:
        self.note(last_line(outcome, self._last, time.monotonic() - self._began))
