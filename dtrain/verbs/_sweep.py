"""Several runs by one command: one after the other, or as the tasks of a scheduler's job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError, DtrainError, UserError
from dtrain.runs.outcomes import STOPPED

if TYPE_CHECKING:
    from dtrain.config.spec import Job, LauncherSpec
    from dtrain.plan.propose import Proposal
    from dtrain.runs import RunDir

LONGEST_NAME = 200
_DONE = "done"


def launch(combinations: list[list[str]], args: argparse.Namespace) -> int:
    """A run for each combination. Nothing is started unless all can be; where one fails, the others run all the same.

    The exit code: 75 where a run was stopped, which ends the sweep; else the first that is not 0.
    """
    from dtrain.runs.listing import summary
    from dtrain.verbs import launch as one
    from dtrain.verbs._report import report
    from dtrain.verbs.runs import overview

    proposals = _propose(combinations, args.config_dir)
    names = _names(combinations, [proposal.config.run.name for proposal in proposals])
    typed = [[*overrides, f"run.name='{name}'"] for overrides, name in zip(combinations, names, strict=True)]
    runs = [_run(proposal, name) for proposal, name in zip(proposals, names, strict=True)]
    words = [one.words(overrides, args) for overrides in typed]
    job = _array(proposals, runs, words)
    if job is not None:
        return _as_tasks(job, runs, typed, args)
    codes: list[int] = []
    for i, overrides in enumerate(typed):
        _head(i, names, combinations[i])
        try:
            codes.append(one.launch(overrides, args))
        except DtrainError as error:
            codes.append(report(error))
        if codes[-1] == STOPPED:
            break
    became = _became(proposals, runs, words, args)
    print(f"--- {codes.count(0)} of {len(names)} runs {became}")
    if became == _DONE:
        print("\n".join(overview([summary(run) for run in runs[: len(codes)] if run.config.is_file()])))
    for name, code in zip(names, codes, strict=False):
        if code:
            print(f"    {name}: exit code {code}")
    return STOPPED if STOPPED in codes else next((code for code in codes if code), 0)


def _array(proposals: Sequence[Proposal], runs: Sequence[RunDir], words: Sequence[Sequence[str]]) -> Job | None:
    """One job for all; None where each is started or handed over by itself."""
    launchers = [proposal.config.launcher for proposal in proposals]
    if len(runs) < 2:
        return None
    job = launchers[0].array([(run.path, typed) for run, typed in zip(runs, words, strict=True)])
    if job is None:
        check_no_array(launchers, "here the runs are started one after the other; leave it out")
    elif any(launcher != launchers[0] for launcher in launchers):
        check_no_array(launchers, "runs that differ in keys of launcher are jobs of their own; leave it out")
        print("the runs ask for different jobs, by what is swept of launcher: one is submitted for each", flush=True)
        return None
    return job


def check_no_array(launchers: Sequence[LauncherSpec], why: str) -> None:
    """Raises ConfigError with the values that say something of tasks of one job, where there is none."""
    if values := dict.fromkeys(value for launcher in launchers for value in launcher.of_arrays()):
        raise ConfigError.of(f"{value}: is of a sweep that is one job, and {why}" for value in values)


def _as_tasks(job: Job, runs: Sequence[RunDir], typed: Sequence[list[str]], args: argparse.Namespace) -> int:
    from dtrain.plan.describe import describe
    from dtrain.plan.propose import propose
    from dtrain.verbs import _submit

    named = [propose(overrides, args.config_dir) for overrides in typed]
    names = [run.name for run in runs]
    for i, proposal in enumerate(named):
        _head(i, names, typed[i][:-1])
        print(describe(proposal.config, proposal.plan), flush=True)
    print()
    if args.dry_run:
        _submit.show(job)
        return 0
    return _submit.submit(job, runs, named)


def _head(i: int, names: Sequence[str], overrides: Sequence[str]) -> None:
    from dtrain.runs import redact

    print(f"--- run {i + 1} of {len(names)}: {names[i]}: {' '.join(redact(overrides))}", flush=True)


def _became(proposals: Sequence[Proposal], runs: Sequence[RunDir], words: Sequence[Sequence[str]],
            args: argparse.Namespace) -> str:  # fmt: skip
    """What the exit code 0 of a run means."""
    if args.dry_run:
        return "shown"
    jobs = [one.config.launcher.job(run.path, typed) for one, run, typed in zip(proposals, runs, words, strict=True)]
    return "submitted" if any(job is not None and not job.now for job in jobs) else _DONE


def _run(proposal: Proposal, name: str) -> RunDir:
    from dtrain.runs import RunDir

    return RunDir(Path(proposal.config.run.dir) / name)


def _propose(combinations: list[list[str]], config_dir: Path | None) -> list[Proposal]:
    """Raises ConfigError with what is wrong in any."""
    from dtrain.plan.propose import propose

    problems: dict[str, None] = {}
    found = []
    for overrides in combinations:
        try:
            found.append(propose(overrides, config_dir))
        except UserError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if problems:
        raise ConfigError.of(problems)
    return found


def _names(combinations: list[list[str]], names: Sequence[str]) -> list[str]:
    """A name for each run: the configured one, and what differs."""
    if len(set(names)) == len(names):
        return list(names)
    differ = [
        [text for i, text in enumerate(one) if len({other[i] for other in combinations}) > 1] for one in combinations
    ]
    tails = [re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(text.lstrip("+~") for text in one)) for one in differ]
    full = [f"{name}-{tail}" if tail else name for name, tail in zip(names, tails, strict=True)]
    if len(set(full)) < len(full) or max(map(len, full)) > LONGEST_NAME:
        return [f"{name[: LONGEST_NAME - 8]}-{i}" for i, name in enumerate(names)]
    return full
