"""Hand a run to a scheduler: show its script, submit it, and say how to follow it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from dtrain.errors import RunError

if TYPE_CHECKING:
    from dtrain.config.spec import Job
    from dtrain.plan.propose import Proposal
    from dtrain.runs import RunDir


def show(job: Job) -> int:
    how = ["bash", job.file] if job.now else [*job.submit, job.file]
    print(f"submit     {shlex.join(how)}\n\n{job.script}", end="")
    return 0


def submit(job: Job, runs: Sequence[RunDir], proposals: Sequence[Proposal]) -> int:
    """Hand it over, or run it in the allocation that there is; returns the exit code. Raises RunError.

    A job for several runs has its script in the folder of each.
    """
    from dtrain.verbs import launch

    for run in runs:
        launch.check_folder(run)
    if job.prepare:
        for proposal in proposals:
            launch.prepare_all(proposal)
    else:
        print("data and model are prepared in the job (launcher.prepare=job)")
    for run in runs:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / job.file).write_text(job.script, encoding="utf-8")
    script = runs[0].path / job.file
    if job.now:
        print(
            f"in job {os.environ['SLURM_JOB_ID']}, which is there already: bash {shlex.quote(str(script))}", flush=True
        )
        return _run(["bash", str(script)])
    argv = [*job.submit, str(script)]
    if job.elsewhere and shutil.which(argv[0]) is None:
        print(f"written    {script}; {argv[0]} is not found here: type this where it is\n           {shlex.join(argv)}")
        return 0
    number = _hand_over(argv)
    for place, run in enumerate(runs):
        run.event("submitted", job=job.task.format(job=number, place=place))
    tasks = "" if len(runs) == 1 else f": {len(runs)} runs submitted, as its tasks 0 to {len(runs) - 1}"
    print(f"submitted  job {number}{tasks}; script {script}")
    follow = job.follow(number)
    width = max(map(len, follow))
    for what, words in follow.items():
        print(f"{what:<{width}} {shlex.join(words)}")
    return 0


def _hand_over(argv: list[str]) -> str:
    """The job's number."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RunError(f"{argv[0]}: not found; type this on a machine that can submit jobs, or see --dry-run") from None
    if done.returncode:
        raise RunError(f"{argv[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.split(";")[0].strip()


def _run(argv: list[str]) -> int:
    """Run the script here; the first signal has the run save and end, by the script's own trap, another one ends it."""
    from dtrain.runs.beside import caught

    process = subprocess.Popen(argv, start_new_session=True)
    told: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        told.append(signum)
        if len(told) == 1:
            process.send_signal(signal.SIGUSR1)
        else:
            os.killpg(process.pid, signal.SIGTERM)

    with caught(on_signal):
        return process.wait()
