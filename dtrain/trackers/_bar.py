"""The console on a terminal."""

from __future__ import annotations

import os
import time
from typing import TextIO, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from dtrain.trackers._words import duration
from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport
from dtrain.trackers.console import Eta, eval_line, figures, last_line


@final
class Bar(AbstractTracker):
    """A bar and a line of figures that are redrawn in place; notes and evaluations scroll by above them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = Console(file=stream, highlight=False, soft_wrap=False)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._figures = Text("waiting for the first step", style="dim", no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._figures), console=self._console, refresh_per_second=4,
                          redirect_stdout=False, redirect_stderr=False)  # fmt: skip
        self._task = self._progress.add_task("", total=1, left="")
        self._eta = Eta(0, 0)
        self._began = time.monotonic()
        self._last: StepReport | None = None

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        self._fit()
        self._eta = Eta(steps, first_step)
        self._began = time.monotonic()
        self._progress.update(self._task, total=steps, completed=first_step)
        for line in lines:
            self.note(line)
        self._live.start()

    def step(self, report: StepReport) -> None:
        self._fit()
        self._last = report
        left = self._eta.after(report.step)
        text = "" if left is None or report.step >= self._eta.steps else f"{duration(left)} left"
        self._progress.update(self._task, completed=report.step, left=text)
        self._figures.plain = figures(report)
        self._figures.style = ""

    def eval(self, report: EvalReport) -> None:
        self.note(eval_line(report))

    def note(self, line: str) -> None:
        self._console.print(Text(line))

    def finish(self, *, outcome: str) -> None:
        self._live.stop()
        self.note(last_line(outcome, self._last, time.monotonic() - self._began))

    def _fit(self) -> None:
        """Follow the terminal's width; rich would ask stdin and stdout, which in a worker are no terminal."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return
        self._console.size = (max(size.columns, 20), max(size.lines, 4))
