"""Every strategy on this machine's GPUs, by the real command: tokens/s, MFU, peak memory, and losses that agree.

    make gpu-check              # or: python bench/gpu_check.py [--steps 30] [--quick]

In bf16 each choice of `conf/strategy` trains the same 0.2 B model on the same rows; losses must agree step by step to
bf16 noise. Then what only a GPU can show: fp16 with loss scaling, fp32 against bf16, ZeRO-3 with offload, recomputed
activations, each back end of attention, and the loss by Liger's kernel, where that is installed, and by chunks; before
that, each back end on small models of the presets' families, in each precision, and the kernel beside chunks. Prints a
table, writes it to docs/benchmarks.md under the device's name, exits 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["model.hidden=1024", "model.layers=12", "model.heads=16", "model.kv_heads=8", "model.intermediate=3072",
         "model.vocab=16384"]  # fmt: skip
WARM_UP = 5
FAMILIES = {
    "qwen2": {},
    "mistral": {"sliding_window": 64, "head_dim": 64},
    "gemma2": {"sliding_window": 64, "head_dim": 64, "attn_logit_softcapping": 50.0},
}
"""Of model types: what their configurations add."""
OURS = ("varlen", "documents", "document_scores")
"""Back ends that must pass wherever they say that they can."""
BOUND = 2e-2
"""Relative difference of losses in bf16: 2^-8 = 4e-3 of each operation, over the steps of a short run."""


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--steps", type=int, default=30)
    args.add_argument("--quick", action="store_true", help="one bf16 run for each strategy, and no more")
    args.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = args.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is visible here; nothing was checked", file=sys.stderr)
        return 2
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    print(device, flush=True)
    out = Path(tempfile.mkdtemp(prefix="dtrain-gpu-"))
    rows, problems = [], [*_try_attention(), *_try_loss()]
    try:
        reference = None
        for label, typed in _cases(quick=args.quick):
            row = _run(out, label, [*MODEL, f"train.steps={args.steps}", *typed])
            rows.append(row)
            print(_line(row), flush=True)
            if row["error"]:
                problems.append(f"{label}: {row['error']}")
            elif "bf16" in label:
                reference = reference or row["losses"]
                far = max(abs(a - b) / b for a, b in zip(row["losses"], reference, strict=True))
                if far > BOUND:
                    problems.append(
                        f"{label}: losses differ from the first strategy's by {far:.1%}, more than {BOUND:.0%}"
                    )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    table = "\n".join([f"### {device}", "", "| run | tokens/s | MFU | peak GiB | first loss | last loss |",
                       "|---|---|---|---|---|---|", *map(_row, rows)])  # fmt: skip
    print("\n" + table)
    if args.write:
        _write(table)
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


def _cases(*, quick: bool) -> list[tuple[str, list[str]]]:
    sys.path.insert(0, str(ROOT))
    from dtrain.config.compose import choices, group_choice

    concrete = [name for name in choices()["strategy"] if "order" not in group_choice("strategy", name)]
    cases = [(f"{name} bf16", [f"strategy={name}", "train.precision=bf16"]) for name in concrete]
    if quick:
        return cases
    more = [(f"{name} fp16", [f"strategy={name}", "train.precision=fp16"]) for name in concrete]
    first, last = concrete[0], concrete[-1]
    return [*cases, *more, (f"{first} fp32", [f"strategy={first}", "train.precision=fp32"]),
            (f"{last} bf16 offload", [f"strategy={last}", "train.precision=bf16", "strategy.offload_optimizer=cpu",
                                      "strategy.offload_param=cpu"]),
            (f"{first} bf16 recomputed", [f"strategy={first}", "train.precision=bf16",
                                          "train.activation_checkpointing=true"]),
            *((f"{first} bf16 {name}", [f"strategy={first}", "train.precision=bf16", f"model.attention={name}"])
              for name in _attention_names()),
            *((f"{first} bf16 loss by {name}", [f"strategy={first}", "train.precision=bf16", f"model.loss={name}"])
              for name in ("chunks", *(["liger"] if _has_liger() else [])))]  # fmt: skip


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _try_loss() -> list[str]:
    """Liger's kernel beside chunks: with small and large vocabularies, capped logits and a bias."""
    import torch
    from torch import nn

    from dtrain.models._head import Head, Logits
    from dtrain.models._loss import LIGER, fault
    from dtrain.models.base import Setting

    if not _has_liger():
        print("loss      liger is not installed: pip install 'dtrain[liger]', to check it", flush=True)
        return []
    problems = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab, bias, cap in ((151_936, False, None), (32_000, True, None), (50_257, False, 30.0)):
            head = Head(nn.Linear(64, vocab, bias=bias), Logits(cap=cap))
            wrong = fault(LIGER, head, Setting(torch.device("cuda", 0), dtype, packed=True))
            label = f"{str(dtype).removeprefix('torch.')} {vocab:,} tokens{', a bias' * bias}{', capped' * bool(cap)}"
            print(f"loss      liger {label:32} {wrong or 'passes'}", flush=True)
            if wrong:
                problems.append(f"loss liger {label}: {wrong}")
    return problems


def _attention_names() -> list[str]:
    """Back ends that can do what the model above asks, in bf16 here."""
    import torch
    from transformers import AutoConfig

    from dtrain.models.attention.choose import BACKENDS

    asked, _ = _asked("qwen2", AutoConfig.for_model("qwen2"), torch.bfloat16)
    return [one.name for one in BACKENDS if one.lacks(asked) is None]


def _asked(kind: str, config, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    from dtrain.models.attention.base import Asked
    from dtrain.models.base import Setting

    setting = Setting(torch.device("cuda", 0), dtype, packed=True)
    return Asked.of(AutoModelForCausalLM._model_mapping[type(config)], config, setting), setting


def _try_attention() -> list[str]:
    """Every back end on small models, packed; problems of those that should have passed."""
    import time

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(ROOT))
    from dtrain.models.attention.choose import BACKENDS
    from dtrain.models.attention.probe import Probe

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    problems = []
    for kind, further in FAMILIES.items():
        config = AutoConfig.for_model(kind, **sizes, **further)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            asked, setting = _asked(kind, config, dtype)
            probe = Probe(AutoModelForCausalLM._model_mapping[type(config)], config, setting)
            for backend in BACKENDS:
                began = time.perf_counter()
                lacks = backend.lacks(asked)
                fault = lacks or probe.fault(backend)
                label = f"{kind} {str(dtype).removeprefix('torch.')} {backend.name}"
                print(f"attention {label:36} {fault or 'passes'}  {time.perf_counter() - began:.2f} s", flush=True)
                if fault and not lacks and backend.name in OURS:
                    problems.append(f"attention {label}: {fault}")
    return problems


def _run(out: Path, label: str, typed: list[str]) -> dict:
    name = label.replace(" ", "-")
    command = [sys.executable, "-m", "dtrain", "launch", f"run.dir={out}", f"run.name={name}", "device=cuda",
               "dataset.max_length=2048", "dataset.max_files=null", "batch.global_batch=32", "batch.micro_batch=8",
               "schedule.warmup_steps=5", "optim.lr=3e-4", "tracker=[jsonl]", "eval.max_rows=16", *typed]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"label": label, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    steps = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    late = steps[WARM_UP:]
    return {
        "label": label, "error": "", "losses": [one["loss"] for one in steps],
        "tokens_per_s": statistics.median(one["tokens_per_s"] for one in late),
        "mfu": statistics.median(one["mfu"] for one in late) if late[0]["mfu"] is not None else None,
        "peak": max(one["mem_bytes"] for one in steps) / 2**30,
    }  # fmt: skip


def _line(row: dict) -> str:
    if row["error"]:
        return f"{row['label']:28} FAILED {row['error']}"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (f"{row['label']:28} {row['tokens_per_s']:>10,.0f} tok/s  mfu {mfu:>6}  peak {row['peak']:6.2f} GiB  "
            f"loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}")  # fmt: skip


def _row(row: dict) -> str:
    if row["error"]:
        return f"| {row['label']} | failed: {row['error']} | | | | |"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (f"| {row['label']} | {row['tokens_per_s']:,.0f} | {mfu} | {row['peak']:.2f} | {row['losses'][0]:.4f} | "
            f"{row['losses'][-1]:.4f} |")  # fmt: skip


def _write(table: str) -> None:
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    page.write_text(text.rstrip() + "\n\n" + table + "\n")


if __name__ == "__main__":
    sys.exit(main())
