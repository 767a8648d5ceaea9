"""What a child of the doctor does: `python -m dtrain.doctor._probe NAME` prints one line of JSON, or fails."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def devices() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    said: dict[str, Any] = {
        "torch": torch.__version__, "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "gpus": 0,
    }  # fmt: skip
    if cuda:
        said |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
                 "bf16": torch.cuda.is_bf16_supported()}  # fmt: skip
        if said["nccl"]:
            said["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
        for index in range(torch.cuda.device_count()):
            side = torch.randn(256, 256, device=f"cuda:{index}")
            assert torch.isfinite(side @ side).all(), f"cuda:{index} computes what is no number"
    return said


def attention() -> dict[str, Any]:
    """The one of torch itself, forward and backward, in the precision that runs use."""
    import torch

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    query = torch.randn(1, 4, 64, 64, device=device, dtype=dtype, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()
    return {"on": device}


def flash_attn() -> dict[str, Any]:
    import flash_attn
    import torch

    if torch.cuda.is_available():
        query = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        flash_attn.flash_attn_func(query, query, query, causal=True).sum().backward()
    return {"on": "cuda" if torch.cuda.is_available() else None}


def liger_kernel() -> dict[str, Any]:
    """What `model.loss` takes of it, forward and backward."""
    import liger_kernel.transformers  # noqa: F401
    import torch

    from dtrain.models._head import Logits
    from dtrain.models._liger import cross_entropy

    if torch.cuda.is_available():
        hidden, weight = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "ab")
        ids = torch.arange(64, device="cuda")
        cross_entropy(hidden, weight, None, ids, torch.bfloat16, Logits()).backward()
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
    return {"on": "cuda" if torch.cuda.is_available() else None}


def bitsandbytes() -> dict[str, Any]:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(torch.randn(64, 64, device=device), quant_type="nf4")
    assert torch.isfinite(dequantize_4bit(packed, state)).all()
    return {"on": device}


def deepspeed() -> dict[str, Any]:
    import torch

    from dtrain.strategies._zero import look  # the one module that imports it

    return look(cuda=torch.cuda.is_available())


def compiler() -> dict[str, Any]:
    """torch.compile, which needs Triton and a C compiler."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = torch.compile(lambda x: torch.nn.functional.silu(x) * x)
    assert torch.isfinite(made(torch.ones(64, device=device))).all()
    return {"on": device}


def ranks() -> dict[str, Any]:
    """One of several processes: how fast they sum up what they have, and how long each takes to compute the same."""
    import datetime

    import torch
    import torch.distributed as dist

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=60))
    num_bytes = 1 << (28 if device.type == "cuda" else 24)
    tensor = torch.ones(num_bytes // 4, device=device)
    times = []
    for _ in range(6):
        tensor.fill_(1.0)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        assert float(tensor[-1]) == dist.get_world_size(), "a sum over the ranks is wrong"
        times.append(time.perf_counter() - began)
    size = dist.get_world_size()
    took = torch.zeros(size, device=device)
    took[rank] = _compute_s(device)
    dist.all_reduce(took)
    return {
        "rank": rank,
        "compute_ms": [round(1000 * one, 3) for one in took.tolist()],
        "gb_per_s": 2 * (size - 1) / size * num_bytes / min(times[1:]) / 1e9,
        "backend": dist.get_backend(),
    }


def _compute_s(device: torch.device) -> float:
    """Of a product of matrices, the best of some."""
    import torch

    cuda = device.type == "cuda"
    side = torch.randn(4096 if cuda else 384, 4096 if cuda else 384, device=device)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        float((side @ side)[0, 0])
        times.append(time.perf_counter() - began)
    return min(times)


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    probe.__name__: probe
    for probe in (devices, attention, flash_attn, liger_kernel, bitsandbytes, deepspeed, compiler, ranks)
}


def main() -> None:
    said = PROBES[sys.argv[1]]()
    sys.stdout.write("\n" + json.dumps(said) + "\n")
    sys.stdout.flush()
    os._exit(0)  # without the teardown in which process groups may wait for each other


if __name__ == "__main__":
    main()
