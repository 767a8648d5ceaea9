"""Named places where a test ends or delays this process, as a power cut would: by the environment, never by accident.

`DTRAIN_FAIL=ckpt.manifest:kill` kills every process that comes to that place; `ckpt.tensors:kill:rank=1:after=2` the
one of rank 1, at the third time; `ckpt.tensors:sleep=0.5` waits there; `ckpt.tensors:full:times=1` fails as a full disk
does, once; `train.forward:oom:attempt=0` as a device without memory does, in the run's first attempt;
`at.eval:term` is told to stop there, as by a scheduler.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "DTRAIN_FAIL"
_passed: dict[str, int] = {}


def reach(name: str) -> None:
    """Say that this process is at the place `name`."""
    said = os.environ.get(VARIABLE)
    if said is None:
        return
    for one in said.split(","):
        place, what, *conditions = one.split(":")
        if place != name:
            continue
        limits = dict(condition.split("=", 1) for condition in conditions)
        if limits.get("rank", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
            continue
        if limits.get("attempt", os.environ.get("DTRAIN_ATTEMPT", "0")) != os.environ.get("DTRAIN_ATTEMPT", "0"):
            continue
        _passed[one] = _passed.get(one, 0) + 1
        after = int(limits.get("after", "0"))
        if not after < _passed[one] <= after + int(limits.get("times", "1000000000")):
            continue
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif what.startswith("sleep="):
            time.sleep(float(what.removeprefix("sleep=")))
        elif what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif what == "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        else:
            raise ValueError(f"{VARIABLE}={said}: {what}: none of kill, term, sleep=SECONDS, full, oom")
