"""Try a run before it is queued: its longest rows, an eval, a save, a stop by a signal, going on; then remove it all.

The words are those of `dtrain launch`. It shows in minutes what else would end a run hours later: memory for the worst
batch, a disk that takes no save, a checkpoint that cannot be gone on from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import ConfigError, RunError
from dtrain.runs.beside import caught
from dtrain.runs.outcomes import STOPPED
from dtrain.verbs import _overrides

if TYPE_CHECKING:
    from dtrain.plan.propose import Proposal
    from dtrain.runs import RunDir

STEPS = 2
"""Of each of the two attempts: one is saved and evaluated after, another is signalled in."""
LEAST_STEPS = 2 * STEPS + 1
"""That the run must have for both to be stopped."""
SUFFIX = ".rehearsal"


def add(parser: argparse.ArgumentParser) -> None:
    _overrides.add(parser)
    parser.add_argument("--keep", action="store_true", help="leave the run folder")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    from dtrain.plan.propose import propose
    from dtrain.runs import RunDir

    if args.help:
        print(_overrides.help_text(args.parser, args.config_dir), end="")
        return 0
    proposal = propose(args.overrides, args.config_dir)
    where = [] if args.config_dir is None else ["--config-dir", str(args.config_dir)]
    kept = [one for one in args.overrides if not one.lstrip("+~").startswith(("run.name=", "tracker"))]
    typed = [*where, *kept, *_changes(proposal)]
    run = RunDir(Path(proposal.config.run.dir) / _name(proposal))
    if run.holder() is not None:
        raise RunError(f"{run.path}: another rehearsal of this run is at it; wait for its end")
    shutil.rmtree(run.path, ignore_errors=True)
    print(f"--- rehearsal of {proposal.config.run.name}: the first {STEPS} steps, with {_rows(proposal)}", flush=True)
    codes = [_launch(typed)]
    if codes[0] == STOPPED:
        print(f"--- rehearsal of {proposal.config.run.name}: going on", flush=True)
        codes.append(_launch(typed))
    problem = _problem(run, codes)
    print("\n".join(["", *_told(run, proposal, problem)]), flush=True)
    if problem is None and not args.keep:
        shutil.rmtree(run.path, ignore_errors=True)
    return 0 if problem is None else (codes[-1] if codes[-1] not in (0, STOPPED) else 3)


def _changes(proposal: Proposal) -> list[str]:
    """To what was typed. Raises ConfigError where the run is not started here."""
    config = proposal.config
    name = f"run.name='{_name(proposal)}'"
    job = config.launcher.job(Path(config.run.dir) / config.run.name, ["launch"])
    if proposal.plan.topology.nodes > 1 or (job is not None and not job.now):
        raise ConfigError(f"launcher: a rehearsal is made on one machine, and these words mean "
                          f"{proposal.plan.topology.nodes}; type launcher=local for it, in an allocation where the "
                          f"machine has GPUs")  # fmt: skip
    if (why := config.strategy.unsavable()) is not None:
        raise ConfigError(f"{why}, which a rehearsal does; `dtrain launch train.steps=2` shows the rest")
    most = min(config.eval.max_rows or proposal.plan.batch.global_batch, proposal.plan.batch.global_batch)
    short = config.train.steps is not None and config.train.steps < LEAST_STEPS
    return [name, "eval.every_steps=1", f"eval.max_rows={most}", "checkpoint.every_steps=1", "checkpoint.on_error=stop",
            "tracker=[console,jsonl]", "tracker.jsonl.plot=false",
            *([f"train.steps={LEAST_STEPS}"] if short else [])]  # fmt: skip


def _name(proposal: Proposal) -> str:
    return proposal.config.run.name[:180] + SUFFIX


def _rows(proposal: Proposal) -> str:
    """Which rows are tried, in words."""
    return "rows of the stream as they come" if proposal.config.dataset.streaming else "the longest rows"


def _launch(typed: list[str]) -> int:
    """The very command, with the screen as it is; a signal is for it."""
    from dtrain.runs.process import REHEARSAL

    env = {**os.environ, REHEARSAL: str(STEPS)}
    process = subprocess.Popen([sys.executable, "-m", "dtrain", "launch", *typed], env=env, stdin=subprocess.DEVNULL)
    with caught(lambda number, frame: process.send_signal(number), (signal.SIGINT, signal.SIGTERM)):
        return process.wait()


def _problem(run: RunDir, codes: list[int]) -> str | None:
    """What did not go as it should; None where all did."""
    outcome = run.read_outcome()
    if codes[-1] != STOPPED:
        how = "" if outcome is None else f": {outcome.kind}"
        return f"{'it' if len(codes) == 1 else 'going on'} ended with exit code {codes[-1]}{how}"
    begun = [int(one.get("first_step") or 0) for one in run.read_manifest().get("attempts", [])]
    if begun != [0, STEPS]:
        return f"the second attempt did not begin at step {STEPS}: {begun}; was it stopped by another signal?"
    if outcome is None or outcome.step != 2 * STEPS:
        return f"it was stopped before step {2 * STEPS}"
    return None


def _told(run: RunDir, proposal: Proposal, problem: str | None) -> Iterator[str]:
    """A line for each part."""
    from dtrain.runs.account import seconds_of
    from dtrain.runs.files import read_lines
    from dtrain.trackers._words import duration, size

    rows, events = list(read_lines(run.metrics)), list(read_lines(run.events))
    started = [seconds_of(event["time"]) for event in events if event["kind"] in ("launched", "training")]
    starts = [duration(end - begin) for begin, end in zip(started[::2], started[1::2], strict=False)]
    yield f"start-up   {', to go on '.join(starts) or 'did not end'}"
    if rows:
        worst = max(rows, key=lambda row: row["mem_bytes"])
        there = size(proposal.plan.capacity_bytes)
        yield f"memory     at most {size(worst['mem_bytes'])} of {there} a rank, with {_rows(proposal)}"
        yield f"step       {min(row['step_s'] for row in rows):.2f} s with them: {rows[0]['tokens']:,} tokens"
        yield from _whole(run, rows)
    for event in [event for event in events if event["kind"] == "saved"][:1]:
        took = f"{event['write_s']:.1f} s, of which training waits {event['pause_s']:.2f} s"
        yield f"save       {event['bytes'] / 1e6:,.1f} MB in {took}"
    evals = list(read_lines(run.path / "eval.jsonl"))
    if evals:
        yield f"eval       {evals[0]['eval_s']:.2f} s for {evals[0]['num_targets']:,} targets"
    well = "stop       saved, and gone on from there"
    yield well if problem is None else f"failed     {problem}; its folder stays: {run.path}"


def _whole(run: RunDir, rows: list[dict[str, Any]]) -> Iterator[str]:
    from dtrain.trackers._words import duration

    steps = run.read_manifest().get("steps")
    if steps and steps > LEAST_STEPS:
        whole = duration(steps * min(row["step_s"] for row in rows))
        yield f"run        {whole} for {steps:,} steps, if all were like these"
