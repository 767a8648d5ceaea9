"""Attention over packed rows: a mask of the whole row against each document by itself; time and peak memory.

    python bench/attention.py [--lengths 2048,4096,8192] [--rounds 3] [--dry]

One row of eight documents of unequal lengths goes forward and backward through a small Qwen2, each time in a process of
its own, the back ends in turn. On a GPU, where there is one, in bf16 and with every back end that it has; else on one
core of the CPU in fp32, where CPU time is taken, which other work on the machine changes less. Writes a section of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report

SHARES = (1, 2, 3, 4, 5, 6, 7, 8)
"""Of the row, by document."""
CONFIG = {"model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 1024, "max_position_embeddings": 1 << 17,
          "tie_word_embeddings": True}  # fmt: skip
MASKED = "sdpa"
"""What the others are compared with."""


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--lengths", default="2048,4096,8192", help="tokens of the row")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--dry", action="store_true", help="leave docs/benchmarks.md as it is")
    args.add_argument("--one", nargs=2, metavar=("BACKEND", "LENGTH"), help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return 0
    lengths = [int(text) for text in args.lengths.split(",")]
    names = backends()
    print(f"{', '.join(names)}; {report.machine()}", flush=True)
    found: dict[tuple[int, str], list[dict]] = {}
    busy = 0
    for _ in range(args.rounds):
        for length in lengths:
            for name in names:
                others = report.Others()
                command = [sys.executable, __file__, "--one", name, str(length)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                busy += others.busy
                one = json.loads(done.stdout)
                found.setdefault((length, name), []).append(one)
                print(f"{length:6} {name:16} {one['s']:8.3f} s  {one['peak'] / 2**20:8.0f} MiB", flush=True)
    far = max(_far(one["grad"], found[length, MASKED][0]["grad"])
              for (length, _), all_ in found.items() for one in all_)  # fmt: skip
    text = section(found, lengths, names, args.rounds, busy, far)
    print("\n" + text)
    if not args.dry:
        report.write_section("attention", text)
    return 0


def backends() -> list[str]:
    """The mask first, then all that this machine has for this model."""
    import torch
    from transformers import AutoConfig, Qwen2ForCausalLM

    from dtrain.models.attention.base import Asked
    from dtrain.models.attention.choose import BACKENDS

    asked = Asked.of(Qwen2ForCausalLM, AutoConfig.for_model(**CONFIG), _setting(torch))
    return [MASKED, *(one.name for one in BACKENDS if one.name not in (MASKED, "eager") and one.lacks(asked) is None)]


def _setting(torch):
    from dtrain.models.base import Setting

    cuda = torch.cuda.is_available()
    return Setting(torch.device("cuda", 0) if cuda else torch.device("cpu"), torch.bfloat16 if cuda else torch.float32,
                   packed=True)  # fmt: skip


def measure(name: str, length: int) -> dict:
    """Seconds, on a CPU of its time, of the better of two passes, after one over a short row; bytes that they took."""
    import torch

    from dtrain.models._causal import build_causal
    from dtrain.models.attention.choose import BACKENDS
    from dtrain.strategies.shared import materialise

    setting = _setting(torch)
    clock = time.perf_counter if setting.device.type == "cuda" else time.process_time
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        bundle = build_causal(Path(folder), seed=0, from_scratch=True)
    bundle.module.attend_by(next(one for one in BACKENDS if one.name == name))
    materialise(bundle.module, setting.device, setting.dtype)
    with torch.no_grad():
        for key, param in bundle.module.named_parameters():
            param.copy_(bundle.weights.read(key, 0, param.numel()).view(param.shape))
    _pass(bundle.module, _row(torch, 256, setting.device))
    row = _row(torch, length, setting.device)
    if name == "flex_attention":  # compiled anew for another length
        _pass(bundle.module, row)
    before = _start_peak(torch, setting.device)
    times = []
    for _ in range(2):
        began = clock()
        _pass(bundle.module, row)
        times.append(clock() - began)
    peak = _peak(torch, setting.device) - before
    query = bundle.blocks[0].self_attn.q_proj.weight.grad
    return {"s": min(times), "peak": peak, "grad": query.flatten()[:1000].tolist()}


def _far(x: list[float], reference: list[float]) -> float:
    return math.dist(x, reference) / math.hypot(*reference)


def _row(torch, length: int, device) -> dict:
    """One packed row whose every token but the first of a document is a target."""
    lengths = [length * share // sum(SHARES) for share in SHARES]
    lengths[-1] += length - sum(lengths)
    tokens = torch.randint(1, CONFIG["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(one) for one in lengths])
    index = (positions > 0).nonzero()[:, 0] - 1
    row = {"tokens": tokens, "positions": positions[None], "target_index": index, "target_ids": tokens[0][index + 1]}
    return {key: one.to(device) for key, one in row.items()}


def _pass(module, row: dict) -> None:
    module.zero_grad()
    loss = module(**row)
    loss.backward()
    loss.item()  # waits for the device


def _start_peak(torch, device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # the peak of resident memory begins anew
    return _peak(torch, device)


def _peak(torch, device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(one for one in status.read_text().splitlines() if one.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def section(found: dict, lengths: list[int], names: list[str], rounds: int, busy: int, far: float) -> str:
    rows, unit = [], "s" if _cuda() else "CPU s"
    for length in lengths:
        of_mask = [one["s"] for one in found[length, MASKED]]
        for name in names:
            runs = found[length, name]
            times = [one["s"] for one in runs]
            peak = statistics.median(one["peak"] for one in runs)
            mask_peak = statistics.median(one["peak"] for one in found[length, MASKED])
            ratios = [mine / mask for mine, mask in zip(times, of_mask, strict=True)]
            rows.append([f"{length:,}", name, f"{statistics.median(times):.3f} {report.spread(times)}",
                         "" if name == MASKED else f"**{statistics.median(ratios):.2f}**", f"{peak / 2**20:,.0f}",
                         "" if name == MASKED else f"**{peak / mask_peak:.2f}**"])  # fmt: skip
    head = ["tokens", "back end", unit, "of the mask's", "peak MiB", "of the mask's"]
    doubt = [] if rounds >= 3 and not busy else [
        "**Rough figures, not a result: few rounds, or a machine with other work.**"]  # fmt: skip
    return "\n".join([
        "## Attention over packed rows", "",
        f"{report.today()}. {_where()}; {report.versions('torch', 'transformers')}. {busy} of "
        f"{rounds * len(lengths) * len(names)} runs shared the machine with other work.", *doubt, "",
        "One row of eight documents, of 1/36 to 8/36 of its tokens, forward and backward through two layers of a Qwen2",
        f"of width {CONFIG['hidden_size']}; median and half spread of {rounds} interleaved rounds of one process each.",
        f"`{MASKED}` is transformers' way with a mask of the whole row. Peak memory is above what the model takes.",
        "", report.table(head, rows).replace("| --- | ---: |", "| ---: | --- |", 1), "",
        f"Gradients of the first layer's queries differ by {far:.0e} at most.", "",
        "Run it: `python bench/attention.py`.",
    ])  # fmt: skip


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _where() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else report.machine()


if __name__ == "__main__":
    sys.exit(main())
