"""Run a function on real processes over gloo. The first failing rank's traceback is the test's message."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

PRELOAD = ["torch", "torch.distributed", "transformers.models.qwen2.modeling_qwen2", "deepspeed", "tests.processes",
           "pyarrow", "pandas", "xxhash", "dtrain.engine.worker", "dtrain.engine.build", "dtrain.checkpoint.resume",
           "dtrain.checkpoint.saver", "dtrain.data.prepare", "dtrain.datasets.files", "dtrain.models._causal",
           "dtrain.models.tiny", "dtrain.objectives.base", "dtrain.strategies._ddp", "dtrain.strategies._fsdp2",
           "dtrain.strategies._zero", "peft", "bitsandbytes", "dtrain.trackers.fan_out", "dtrain.trackers.jsonl", "tests.preload"]  # fmt: skip
"""Imported once, in the process that all ranks are forked from: a test then costs tenths of a second, not many."""


def open_store() -> Any:
    """A store of torch's that ranks meet in, at `store.port`, as torchrun keeps one for its ranks: it has its port from
    the moment it is open, where one that is looked for first may be another's before rank 0 opens it.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def as_rank(rank: int, size: int, port: int) -> None:
    """Give this process the environment of a rank that meets the others in the store at `port`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                      GLOO_SOCKET_IFNAME="lo")  # fmt: skip


def _rank(rank: int, size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], pipe: Any) -> None:
    as_rank(rank, size, port)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage when it starts, and would look through all that was imported
    try:
        pipe.send((fn(*args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    # Stay until all have spoken: who leaves closes connections that others may still read. Then leave without teardown:
    # torch's process group and DDP can wait for each other there for ever.
    pipe.poll(240)
    os._exit(0)


def run_ranks(fn: Callable[..., Any], *args: Any, size: int = 2, timeout_s: float = 240.0) -> list[Any]:
    """What `fn(*args)` returns on each of `size` processes, in order of rank. Kills what hangs, and names it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = open_store()
    pipes, ends, procs = {}, [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        proc = context.Process(target=_rank, args=(rank, size, store.port, fn, args, theirs), daemon=True)
        proc.start()
        theirs.close()
        pipes[ours] = rank
        ends.append(ours)
        procs.append(proc)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pipes.values())} of {size} did not finish within {timeout_s:.0f} s")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    value, error = pipe.recv()
                except EOFError:
                    value, error = None, "it died without a word (killed by a signal?)"
                if error is not None:
                    raise AssertionError(f"rank {rank} of {size} failed:\n{error}")
                results[rank] = value
        return [results[rank] for rank in range(size)]
    finally:
        for pipe in ends:
            pipe.close()
        for proc in procs:
            proc.join(1.0)
            if proc.is_alive():
                proc.kill()
                proc.join()
