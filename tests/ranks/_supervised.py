"""A rank in miniature, for test_supervise: it fails, ends or waits as its first argument says. No torch unless told."""

import os
import signal
import sys
import time

from dtrain.errors import DataError
from dtrain.runs import RunDir, die_with_parent, record_failure, redirect

what, rank = sys.argv[1], int(os.environ["RANK"])
run, attempt = RunDir(os.environ["DTRAIN_RUN"]), int(os.environ["DTRAIN_ATTEMPT"])
stop = []


def train() -> None:
    if what == "raise":
        if rank == 1:
            raise ValueError("row 7 is a banana")
        time.sleep(1000)  # a rank that would never notice
    if what == "user":
        raise DataError("dataset.path: /nowhere is empty; name a file with rows")
    if what == "silent":
        return
    if what == "gloo":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        (run.path / f"ready-{rank}").write_text(str(os.getpid()))
        while True:
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
    (run.path / f"ready-{rank}").write_text(str(os.getpid()))
    while not stop and what != "done":
        time.sleep(0.02)
    if what == "deaf":
        time.sleep(1000)
    if rank == 0:
        run.write_outcome("stopped" if stop else "done", attempt, step=4)


if __name__ == "__main__":
    die_with_parent()
    console = redirect(run, attempt, rank)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: stop.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    print(f"rank {rank} is in its log")
    if rank == 0:
        console.write("the user sees this\n")
    try:
        train()
    except Exception as error:
        record_failure(run, attempt, rank, error, phase="train", step=3)
        raise
