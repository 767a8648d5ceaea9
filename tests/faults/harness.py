"""`dtrain launch` at the price of a second: everything of the real command but torchrun, and ranks forked from a process
that has imported all they need. A rank is `dtrain.engine.worker.work`, the whole of it; it can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

from dtrain import cli
from dtrain.config.spec import Command
from dtrain.failpoints import VARIABLE
from dtrain.launchers.verdict import judge
from dtrain.runs import Outcome, RunDir
from tests import measured
from tests.processes import PRELOAD, as_rank, open_store

TYPED = ["dataset=files", "dataset.path=texts.jsonl", "dataset.max_length=32", "model.hidden=32", "model.layers=2",
         "model.intermediate=56", "model.vocab=300", "model.max_positions=32", "batch.global_batch=4", "eval.fraction=0.05",
         "eval.every_steps=0", "eval.max_rows=4", "schedule.warmup_steps=2", "optim.lr=5e-3", "tracker=jsonl",
         "tracker.jsonl.plot=false", "checkpoint.every_minutes=null", "checkpoint.every_steps=1", "launcher.procs=2",
         "strategy=ddp"]  # fmt: skip


TOLD = re.compile(r"passed over|which a killed save left|was left by process")
"""What a start says of what became of the one before."""


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to an attempt."""

    fail: str | None = None
    """DTRAIN_FAIL of every rank."""
    kill: Callable[[RunDir, int], bool] = lambda run, attempt: False
    """Of the run and the attempt, asked all the time: whether to kill every rank now."""
    before: Callable[[], None] | None = None
    """Called on each rank first."""
    others_s: float = 5.0
    """What the other ranks get after the first has failed: time to end by themselves, as they do at once."""


def launch(folder: Path, name: str, *typed: str, fault: Fault = Fault()) -> Ended:
    """`dtrain launch run.name=NAME ...` in `folder`; never more than four minutes."""
    out, err, began = _Clocked(), io.StringIO(), time.monotonic()
    with (
        mock.patch("dtrain.launchers.supervise.supervise", functools.partial(_supervise, fault)),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = cli.run(["launch", f"run.name={name}", *TYPED, *typed])
        at = next((word.removeprefix("run.dir=") for word in typed if word.startswith("run.dir=")), "runs")
        _measure(RunDir(Path(at, name).absolute()), began, time.monotonic() if code == 2 else out.told_at)
    return Ended(code, out.getvalue(), err.getvalue())


class _Clocked(io.StringIO):
    """Knows when it was first `TOLD`."""

    told_at: float | None = None

    def write(self, text: str) -> int:
        if self.told_at is None and TOLD.search(text):
            self.told_at = time.monotonic()
        return super().write(text)


def _measure(run: RunDir, began: float, told_at: float | None) -> None:
    """How soon a start noticed what had happened, and what it had to do again."""
    events = [json.loads(line) for line in run.events.read_text().splitlines()] if run.events.is_file() else []
    passed = [event["monotonic"] for event in events if event["kind"] == "passed over" and event["monotonic"] > began]
    if told_at is not None or passed:
        measured.detected(min([*passed[:1], *([told_at] if told_at is not None else [])]) - began)
    for event in events:
        if event["kind"] == "launched":
            measured.lost(event["lost_steps"])


def _supervise(fault: Fault, command: Command, run: RunDir, attempt: int, **how: Any) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    size, store = run.read_manifest()["size"], open_store()
    procs = [context.Process(target=_rank, args=(rank, size, store.port, run.path, attempt, fault.fail, fault.before), daemon=True)
             for rank in range(size)]  # fmt: skip
    for proc in procs:
        proc.start()
    try:
        _watch(procs, lambda: fault.kill(run, attempt), fault.others_s, time.monotonic() + 240)
    finally:
        for proc in procs:
            proc.kill()
            proc.join()
    return judge(run, attempt, returncode=max(abs(proc.exitcode or 0) for proc in procs))


def _watch(procs: Sequence[Any], kill: Callable[[], bool], others_s: float, deadline: float) -> None:
    """Until all have ended, or one has failed and the others had their time, or all are to be killed; `kill` is asked
    once more when all have ended.
    """
    while True:
        running = [proc.sentinel for proc in procs if proc.exitcode is None]
        if kill() or not running:
            return
        if any(proc.exitcode for proc in procs):
            deadline = time.monotonic() + others_s
            while running and time.monotonic() < deadline:
                wait(running, timeout=deadline - time.monotonic())
                running = [proc.sentinel for proc in procs if proc.exitcode is None]
            return
        if time.monotonic() > deadline:
            raise TimeoutError("the ranks did not end")
        wait(running, timeout=0.002)


def _rank(rank: int, size: int, port: int, run: Path, attempt: int, fail: str | None,
          before: Callable[[], None] | None) -> None:  # fmt: skip
    as_rank(rank, size, port)
    os.environ["DTRAIN_ATTEMPT"] = str(attempt)
    if fail is not None:
        os.environ[VARIABLE] = fail
    import torch

    from dtrain.engine.worker import work

    torch.set_num_threads(1)
    record_rows(RunDir(run).attempt_dir(attempt) / f"rank-{rank}.rows.jsonl")
    if before is not None:
        before()
    work(run, plugins=())


def record_rows(to: Path) -> None:
    """Write down which rows this rank takes for each step, before it trains on them."""
    from dtrain.data.loader import Loader

    plain, file = Loader.window, to.open("a", buffering=1)

    def window(self: Loader, samples: int) -> Any:
        batches = plain(self, samples)
        file.write(json.dumps([samples, [int(i) for batch in batches for i in batch.sample_ids]]) + "\n")
        return batches

    Loader.window = window


def rows_of(run: RunDir, attempt: int) -> list[list[tuple[int, list[int]]]]:
    """For each rank, what it took: the number of samples before the step, and its rows of the step."""
    found = []
    for path in sorted(run.attempt_dir(attempt).glob("rank-*.rows.jsonl")):
        lines = path.read_text().splitlines()
        found.append([tuple(json.loads(line)) for line in lines if line.endswith("]]")])
    return found
