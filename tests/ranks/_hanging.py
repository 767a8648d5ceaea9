"""A rank in miniature, for test_hang: it reduces with the other, says where it is, and from step 5 on rank 1 does what
the first argument says.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from dtrain.engine.state import Progress
from dtrain.engine.watched import Watched
from dtrain.runs import RunDir, die_with_parent, redirect


def spin() -> None:
    while True:
        pass


def step(what: str, rank: int, number: int) -> None:
    if rank == 1 and number == 5:
        if what == "spin":
            spin()
        elif what == "sleep":
            time.sleep(1000)
        elif what == "halt":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "slow":
            time.sleep(1.5)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    die_with_parent()
    rank, run, attempt = int(os.environ["RANK"]), RunDir(os.environ["DTRAIN_RUN"]), int(os.environ["DTRAIN_ATTEMPT"])
    redirect(run, attempt, rank)
    progress = Progress()
    watched = Watched(rank, progress)
    progress.at("init")
    dist.init_process_group("gloo")
    for number in range(10):
        progress.at("train", number, [7 * rank])
        step(sys.argv[1], rank, number)
    if rank == 0:
        run.write_outcome("done", attempt, step=10)
    watched.end()
    os._exit(0)
