"""Known causes of failures: what a message tells, and what to do about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dtrain.runs.failures import Failure

OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory|NCCL.*Cuda failure.*out of memory"
    r"|^(torch\.)?OutOfMemoryError\b|^MemoryError\b",
    re.MULTILINE,
)


class _Hint(NamedTuple):
    pattern: str
    text: str


_HINTS = (
    _Hint(r"No space left on device|Errno 28\b|no space left:",
          "the disk is full: make room where the message says, or point run.dir, run.cache or TMPDIR "
          "elsewhere; checkpoint.keep_last sets how many checkpoints stay"),
    _Hint(r"Disk quota exceeded|Errno 122\b", "your quota is used up: remove old runs, or point run.dir elsewhere"),
    _Hint(r"Bus error|SIGBUS|unable to (open|allocate|resize) shared memory|/dev/shm.*No space",
          "shared memory ran out: make /dev/shm larger (docker run --shm-size=8g, or --ipc=host)"),
    _Hint(r"EADDRINUSE|Address already in use|errno: 98\b|failed to listen on any local network address",
          "the port is taken, often by a run that is just ending: launcher.port=auto takes a free one"),
    _Hint(r"undefined symbol: \S*(c10|torch|_ZN2at)|flash_attn\S*\.so: undefined symbol",
          "an extension was built for another torch: build it again for this one, as in `pip install "
          "--no-build-isolation --no-cache-dir --force-reinstall flash-attn`, or take model.attention=sdpa"),
    _Hint(r"FlashAttention only supports Ampere", "this GPU is too old for flash-attn: take model.attention=sdpa"),
    _Hint(r"no kernel image is available for execution on the device|not compatible with the current PyTorch install",
          "this torch was not built for this GPU: install the build for its generation from pytorch.org"),
    _Hint(r"CUDA driver version is insufficient|driver on your system is too old",
          "the driver is older than this torch's CUDA: update it, or install a torch for an older CUDA"),
    _Hint(r"CUDA_HOME (does not exist|environment variable is not set)|MissingCUDAException|nvcc.*not found"
          r"|Unable to JIT load|Error building extension|Ninja is required",
          "an op is compiled when it is first used, which needs nvcc and ninja: load the CUDA module (CUDA_HOME), or "
          "choose what needs no such op (no offload to nvme, optim=adamw)"),
    _Hint(r"Could not run '\S+' with arguments from the 'CUDA' backend|Torch not compiled with CUDA enabled",
          "this torch or extension has no CUDA: install its CUDA build, or set device=cpu"),
    _Hint(r"uncorrectable ECC error|Xid|GPU has fallen off the bus|CUDA error: unspecified launch failure"
          r"|NVLink error|unknown error.*cudaErrorUnknown",
          "the GPU itself seems sick: look at `nvidia-smi -q` and `dmesg` on that host, and leave the host out"),
    _Hint(r"device-side assert triggered|an illegal memory access was encountered",
          "a kernel failed, and the stack shows a later call: CUDA_LAUNCH_BLOCKING=1 shows the right one"),
    _Hint(r"Is there a distributed collective mismatch",
          "a rank did not make the collectives that the others made: a part of a step was left out there, as where "
          "code of your own has caught an error"),
    _Hint(r"Watchdog caught collective operation timeout|collective operation timeout|NCCL.*timed? ?out"
          r"|timed out waiting \d+ ?ms for|Wait timeout",
          "a rank did not come to a collective in time: look at the other ranks' logs for what held it up; "
          "run.hang_after sets when the launcher itself looks for that and writes down all stacks"),
    _Hint(r"ncclSystemError|ncclRemoteError|ncclInternalError|No route to host|Network is unreachable"
          r"|Connection refused.*store|connect\(\) .*timed out",
          "the nodes do not reach each other: name the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); "
          "NCCL_DEBUG=INFO tells what NCCL chose"),
    _Hint(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED",
          "ssh does not know the host: connect once by hand, or `ssh-keyscan HOST >>~/.ssh/known_hosts`"),
    _Hint(r"Permission denied \(publickey", "ssh has no key that the host takes: `ssh-copy-id HOST`"),
    _Hint(r"Too many open files|Errno 24\b", "too few files may be open: `ulimit -n 65536` before the start"),
    _Hint(r"Resource temporarily unavailable.*(fork|thread|clone)|can't start new thread",
          "too few processes may be started: `ulimit -u`, or the container's limit (--pids-limit)"),
)  # fmt: skip


def hint(failure: Failure, log_end: str = "", *, micro_batch: int | None = None) -> str | None:
    """What to do, where the cause is a known one. `log_end`: the last lines of the rank's log, for what native code
    said; `micro_batch`: the one that the run had.
    """
    if failure.kind == "hang":
        return ("the files there have every rank's stacks; run.hang_after=SECONDS gives more time, run.hang_after=off "
                "does not watch")  # fmt: skip
    said = f"{failure.type}: {failure.message}\n{failure.traceback}"
    if failure.kind == "oom" or OUT_OF_MEMORY.search(said):
        return _memory(micro_batch)
    return hint_of(said) or hint_of(log_end)


def hint_of(said: str) -> str | None:
    """The same of a message alone, such as a launcher's."""
    return next((known.text for known in _HINTS if re.search(known.pattern, said)), None)


def _memory(micro_batch: int | None) -> str:
    other = (
        "train.activation_checkpointing=true, a strategy that divides more (zero3, fsdp2), a shorter dataset.max_length"
    )
    if micro_batch is None:
        return f"out of memory: a smaller batch.micro_batch, {other}"
    if micro_batch > 1:
        return (f"out of memory: batch.micro_batch={micro_batch // 2} halves what a forward takes and gives the same "
                f"result; train.on_oom=smaller_micro_batch does that by itself; or {other}")  # fmt: skip
    return f"out of memory with a micro-batch of 1: {other}"
