"""Hand a run to a scheduler: show its script, submit it, and say how to follow it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
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


def submit(job: Job, run: RunDir, proposal: Proposal) -> int:
    """Hand it over, or run it in the allocation that there is; returns the exit code. Raises RunError."""
    from dtrain.verbs import launch

    launch.check_folder(run)
    if job.prepare:
        launch.prepare_all(proposal)
    else:
        print("data and model are prepared in the job (launcher.prepare=job)")
    run.path.mkdir(parents=True, exist_ok=True)
    script = run.path / job.file
    script.write_text(job.script, encoding="utf-8")
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
    run.event("submitted", job=number)
    print(f"submitted  job {number}; script {script}")
    for what, words in job.follow(number).items():
        print(f"{what:<14} {shlex.join(words)}")
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
    process = subprocess.Popen(argv, start_new_session=True)
    told: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        told.append(signum)
        if len(told) == 1:
            process.send_signal(signal.SIGUSR1)
        else:
            os.killpg(process.pid, signal.SIGTERM)

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait()
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
