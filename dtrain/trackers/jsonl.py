"""metrics.jsonl, eval.jsonl, samples.jsonl: one JSON object a line; the loss as a picture at the end; and what labels
the last eval took for which others.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, final

from dtrain.config.spec import TrackerSpec, spec
from dtrain.runs.files import dumps, read_lines
from dtrain.trackers.base import AbstractTracker, EvalReport, SamplesReport, StepReport


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
        self._samples = run_dir / "samples.jsonl"
        self._files: dict[Path, _Lines] = {}
        self._warnings: list[str] = []

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        _keep_until(self._samples, first_step)
        for path in (self._metrics, self._evals):
            _keep_until(path, first_step)
            self._files[path] = _Lines(path, self._warnings)

    def step(self, report: StepReport) -> None:
        self._files[self._metrics].add(dumps(row(report)))

    def eval(self, report: EvalReport) -> None:
        self._files[self._evals].add(dumps(row(report)))
        if report.confusion is not None:
            from dtrain.trackers._plot import draw_confusion

            said = {"step": report.step, **report.confusion._asdict()}
            try:
                (self._run_dir / "confusion.json").write_text(dumps(said) + "\n", encoding="utf-8")
                if self._plot:
                    draw_confusion(report.confusion, self._run_dir / "confusion.png", f"eval at step {report.step}")
            except OSError as error:  # the next eval writes both anew
                self._warnings.append(f"jsonl: no confusion of step {report.step}: {error.strerror}")

    def samples(self, report: SamplesReport) -> None:
        if self._samples not in self._files:  # most runs have none
            self._files[self._samples] = _Lines(self._samples, self._warnings)
        for one in report.samples:
            self._files[self._samples].add(dumps({"step": report.step, **one._asdict()}))

    def note(self, line: str) -> None:
        """Notes are events; this file is for figures."""

    def finish(self, *, outcome: str) -> None:
        for file in self._files.values():
            file.close()
        if self._plot:
            from dtrain.trackers._plot import draw_loss

            draw_loss(list(read_lines(self._metrics)), list(read_lines(self._evals)), self._run_dir / "loss.png")

    def warnings(self) -> list[str]:
        said = list(self._warnings)
        self._warnings.clear()
        return said


@final
class _Lines:
    """A file that takes whole lines. What a full disk refuses waits, and is written in its order when there is room."""

    def __init__(self, path: Path, warnings: list[str]) -> None:
        self._path, self._warnings = path, warnings
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def add(self, line: str) -> None:
        self._waiting.append(line.encode("utf-8", errors="replace") + b"\n")
        before = len(self._waiting)
        try:
            self._write_waiting()
        except OSError as error:
            if before == 1:
                self._warnings.append(f"jsonl: {self._path}: {error.strerror}; its lines wait until there is room")
        else:
            if before > 1:
                self._warnings.append(f"jsonl: {self._path}: there is room again; {before - 1} lines were written late")

    def _write_waiting(self) -> None:
        """Raises OSError with what is left."""
        while self._waiting:
            self._write(self._waiting[0])
            del self._waiting[0]

    def _write(self, line: bytes) -> None:
        """All of it or nothing. Raises OSError."""
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        try:
            self._write_waiting()
        except OSError as error:
            self._warnings.append(
                f"jsonl: {self._path}: the last {len(self._waiting)} lines are lost: {error.strerror}"
            )
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop what an earlier attempt wrote of the steps that are now done again, and a torn last line."""
    if not path.exists():
        return
    kept = "".join(dumps(one) + "\n" for one in read_lines(path) if one.get("step", 0) <= step)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(kept, encoding="utf-8")
    tmp.replace(path)
