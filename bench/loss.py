"""Memory and time of the loss over a large vocabulary: the chunked head against whole logits, forward and backward.

    python bench/loss.py               # 152,064 tokens, 8,192 targets; writes docs/benchmarks.md
    python bench/loss.py --targets 512 --rounds 1 --print

Each measurement is a process of its own: what it takes is its largest resident memory less what it had before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from report import machine, table, today, versions, write_section
from torch import nn

from dtrain.models._head import Head, Logits

WAYS = ("plain, summed", "chunked, summed", "plain, each target", "chunked, each target", "chunked, no gradients")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--targets", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="do not write docs/benchmarks.md")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.vocab, args.targets, args.hidden, args.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, results in found.items():
            out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True, text=True,
                                 stdout=subprocess.PIPE)  # fmt: skip
            results.append(json.loads(out.stdout))
            print(way, results[-1], flush=True)
    text = _section(found, args)
    print(text)
    if not args.print:
        write_section("loss", text)


def measure(way: str, vocab: int, targets: int, hidden: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    linear = nn.Linear(hidden, vocab, bias=False)
    states = torch.randn(targets, hidden, requires_grad=True)
    ids, weigh = torch.randint(0, vocab, (targets,)), torch.rand(targets)
    head = Head(linear, Logits())
    head(states[:2], ids[:2]).backward()  # what a first call makes stays out of it
    states.grad = linear.weight.grad = None
    before, began = _peak_bytes(), time.process_time()
    if way == "plain, summed":
        loss = nn.functional.cross_entropy(linear(states), ids, reduction="sum")
    elif way == "chunked, summed":
        loss = head(states, ids)
    elif way == "plain, each target":
        loss = (linear(states).log_softmax(-1).gather(1, ids[:, None])[:, 0] * weigh).sum()
    elif way == "chunked, each target":
        loss = (head(states, ids, each=True) * weigh).sum()
    else:
        with torch.no_grad():
            loss = head(states, ids)
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.item(), "seconds": time.process_time() - began, "bytes": _peak_bytes() - before,
            "grad": float(linear.weight.grad.norm()) if linear.weight.grad is not None else 0.0}  # fmt: skip


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _section(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    def best(way: str, what: str) -> float:
        values = [one[what] for one in found[way]]
        return min(values) if what == "seconds" else statistics.median(values)

    rows = []
    for way in WAYS:
        plain = "plain, each target" if "each" in way else "plain, summed"
        is_plain = way == plain
        seconds, num_bytes = best(way, "seconds"), best(way, "bytes")
        longer = "" if is_plain else f"{seconds / best(plain, 'seconds'):.2f}"
        less = "" if is_plain else f"{best(plain, 'bytes') / num_bytes:.1f}"
        rows.append([way, f"{seconds:.1f}", longer, f"{num_bytes / 2**20:,.0f}", less, f"{best(way, 'loss'):.6g}",
                     f"{best(way, 'grad'):.6g}"])  # fmt: skip
    head = ["way", "CPU s", "of plain", "peak MiB", "times less", "loss", "norm of the weight's gradient"]
    return f"""## Loss

{today()}. {machine()}; {versions("torch")}.

The projection onto {args.vocab:,} tokens and its cross-entropy, {args.targets:,} targets, hidden size {args.hidden},
fp32, {args.threads} thread{"s" * (args.threads > 1)}, forward and backward; the least CPU time and the median memory of
{args.rounds} processes each. `each target`: the log-probability of every target, weighed by what only the backward
knows, as preference losses need it. The gradient of the projection's weight,
{args.vocab * args.hidden * 4 / 2**20:,.0f} MiB, is in the memory of every way that has gradients.

{table(head, rows)}

Run it: `python bench/loss.py`.
"""


if __name__ == "__main__":
    main()
