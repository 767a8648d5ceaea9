"""metrics.jsonl and eval.jsonl: one JSON object a line; the loss as a picture at the end; and what labels the last eval
took for which others.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, final

from dtrain.config.spec import TrackerSpec, spec
from dtrain.runs.files import dumps
from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport


@spec
class Jsonl(TrackerSpec):
    plot: bool = True
    """Draw loss.png when the run ends, and confusion.png at each eval of a classification."""

    def build(self, run_dir: Path, config: Mapping[str, Any], stream: TextIO) -> AbstractTracker:
        return _Jsonl(run_dir, plot=self.plot)


def row(report: StepReport | EvalReport) -> dict[str, Any]:
    """The report's fields in their order, then its extras; an extra never takes a field's name."""
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)
              if field.name not in ("extras", "confusion")}  # fmt: skip
    return {**fields, **{name: value for name, value in report.extras.items() if name not in fields}}


@final
class _Jsonl(AbstractTracker):
    def __init__(self, run_dir: Path, *, plot: bool) -> None:
        self._run_dir, self._plot = run_dir, plot
        self._metrics, self._evals = run_dir / "metrics.jsonl", run_dir / "eval.jsonl"
        self._files: dict[Path, TextIO] = {}
        self._warnings: list[str] = []

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        for path in (self._metrics, self._evals):
            _keep_until(path, first_step)
            self._files[path] = path.open("a", encoding="utf-8", buffering=1)

    def step(self, report: StepReport) -> None:
        self._files[self._metrics].write(dumps(row(report)) + "\n")

    def eval(self, report: EvalReport) -> None:
        self._files[self._evals].write(dumps(row(report)) + "\n")
        if report.confusion is not None:
            from dtrain.trackers._plot import draw_confusion

            said = {"step": report.step, **report.confusion._asdict()}
            (self._run_dir / "confusion.json").write_text(dumps(said) + "\n", encoding="utf-8")
            if self._plot:
                draw_confusion(report.confusion, self._run_dir / "confusion.png", f"eval at step {report.step}")

    def note(self, line: str) -> None:
        """Notes are events; this file is for figures."""

    def finish(self, *, outcome: str) -> None:
        for file in self._files.values():
            file.close()
        if self._plot:
            from dtrain.trackers._plot import draw_loss

            draw_loss(read_rows(self._metrics), read_rows(self._evals), self._run_dir / "loss.png")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a torn one, left by a kill, is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                rows.append(value)
    return rows


def _keep_until(path: Path, step: int) -> None:
    """Drop what an earlier attempt wrote of the steps that are now done again, and a torn last line."""
    if not path.exists():
        return
    kept = "".join(dumps(one) + "\n" for one in read_rows(path) if one.get("step", 0) <= step)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(kept, encoding="utf-8")
    tmp.replace(path)
