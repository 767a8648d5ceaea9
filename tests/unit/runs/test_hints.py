"""Messages as they are met, and what is said of them."""

from __future__ import annotations

import pytest

from dtrain.runs import Failure
from dtrain.runs.hints import hint, hint_of


def failed(type_: str, message: str, kind: str = "worker", traceback: str = "") -> Failure:
    return Failure(rank=1, host="n1", local_rank=1, phase="train", step=3, kind=kind, type=type_, message=message,
                   traceback=traceback, time_ns=0, log="logs/attempt-0/rank-1.log")  # fmt: skip


CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use."
)
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(("type_", "message"), [
    ("OutOfMemoryError", CUDA_OOM), ("RuntimeError", CPU_OOM), ("MemoryError", ""),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
])  # fmt: skip
def test_out_of_memory_names_the_micro_batch_to_use(type_: str, message: str) -> None:
    assert "batch.micro_batch=4 " in hint(failed(type_, message), micro_batch=8)
    assert "micro-batch of 1: train.activation_checkpointing" in hint(failed(type_, message), micro_batch=1)


@pytest.mark.parametrize(("message", "told"), [
    ("[Errno 28] No space left on device: '/data/runs/a'", "the disk is full"),
    ("[Errno 122] Disk quota exceeded", "quota"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
     "shared memory. Please try to raise your shared memory limit.", "--shm-size"),
    ("The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
     "name: EADDRINUSE, message: address already in use", "launcher.port=auto"),
    ("[Errno 98] Address already in use", "launcher.port=auto"),
    ("/env/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE",
     "built for another torch"),
    ("terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  [enforce fail at /pytorch/"
     "third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 20288 vs 8. Received data size "
     "doesn't match expected size. Is there a distributed collective mismatch in your code?", "a part of a step"),
    ("FlashAttention only supports Ampere GPUs or newer.", "model.attention=sdpa"),
    ("CUDA error: no kernel image is available for execution on the device", "not built for this GPU"),
    ("The NVIDIA driver on your system is too old (found version 11040).", "driver is older"),
    ("CUDA_HOME does not exist, unable to compile CUDA op(s)", "needs nvcc and ninja"),
    ("Could not run 'aten::_fused_adamw' with arguments from the 'CUDA' backend.", "has no CUDA"),
    ("CUDA error: uncorrectable ECC error encountered", "seems sick"),
    ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
    ("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, OpType=ALLREDUCE, NumelIn=1, "
     "Timeout(ms)=600000) ran for 600045 milliseconds before timing out.", "did not come to a collective"),
    ("NCCL error in: ProcessGroupNCCL.cpp:3518, unhandled system error, NCCL version 2.27.5 ncclSystemError: System call "
     "(e.g. socket, malloc) or external library call failed", "NCCL_SOCKET_IFNAME"),
    ("Host key verification failed.", "ssh-keyscan"),
    ("me@n7: Permission denied (publickey,password).", "ssh-copy-id"),
    ("[Errno 24] Too many open files: '/x'", "ulimit -n"),
    ("RuntimeError: can't start new thread", "ulimit -u"),
])  # fmt: skip
def test_each_known_cause_by_a_real_message(message: str, told: str) -> None:
    assert told in hint_of(message)
    assert told in hint(failed("RuntimeError", message))
    assert told in hint(failed("SIGABRT", "killed by SIGABRT"), log_end=f"terminate called\n{message}\nAborted")


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert hint(failed("ValueError", "row 7 is a banana")) is None
    assert hint_of("the memory of this was not lost") is None
