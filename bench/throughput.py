"""Tokens per second of dtrain beside bare loops and other trainers: same weights, same rows, same steps, one machine.

    python bench/throughput.py                                 # dtrain and the bare loops
    python bench/throughput.py --peer-python trl=/path/python  # and others, each from its own environment

Two gloo ranks on CPU with one thread each, fp32, AdamW. All ways run in turn, A B C A B C, and are compared within a
round. A way that did not see the same tokens in each step, or whose loss differs from the bare loop's by more than 1e-3
in any step, is shown as `mismatch` and not ranked. The environments of the others, made once with uv:

    uv venv trl && uv pip install --python trl/bin/python torch==2.13.0 transformers==5.23.0 accelerate datasets trl
    uv venv hf && uv pip install --python hf/bin/python torch==2.13.0 transformers==5.23.0 accelerate datasets
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

from loops import WAYS, Job
from report import Others, load, machine, spread, table, today, versions, write_section

SIZE, MICRO, LENGTH, SEED = 2, 2, 512, 0
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP, WARMUP = 1e-3, (0.9, 0.95), 0.1, 1.0, 5
LOSS_TOLERANCE = 1e-3
FLOOR = {
    "bare_ddp_head": "bare_ddp", "dtrain_ddp": "bare_ddp", "dtrain_ddp_trackers": "bare_ddp",
    "dtrain_fsdp2": "bare_fsdp2", "dtrain_zero3": "bare_zero3", "hf_trainer": "bare_ddp", "trl_sft": "bare_ddp",
}  # fmt: skip
"""What each is compared with; the bare loops themselves are not in here."""
NAMES = {
    "bare_ddp": "bare loop, DistributedDataParallel",
    "bare_ddp_head": "bare loop, DistributedDataParallel, dtrain's head, fused AdamW",
    "dtrain_ddp": "dtrain, ddp",
    "dtrain_ddp_trackers": "dtrain, ddp, console and metrics file",
    "bare_fsdp2": "bare loop, fully_shard",
    "dtrain_fsdp2": "dtrain, fsdp2",
    "bare_zero3": "bare loop, deepspeed.initialize, stage 3",
    "dtrain_zero3": "dtrain, zero3",
    "hf_trainer": "transformers Trainer (DDP)",
    "trl_sft": "TRL SFTTrainer (DDP)",
}
PEERS = {"hf_trainer": "hf", "trl_sft": "trl"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured run of one way."""

    tokens_per_s: float
    step_s: list[float]
    """Of each timed step."""
    cpu_s: float
    peak_mb: float
    busy: bool
    """Whether the machine had other work too."""
    losses: list[float]
    rows: list[list[str]]


def main() -> int:
    args = _parse()
    work = Path(tempfile.mkdtemp(prefix="dtrain-bench-", dir=args.work))
    try:
        assets = make_assets(work, WARMUP + args.steps)
        if args.profile:
            return profile(args, work, assets)
        runs: dict[str, list[Run]] = {way: [] for way in args.ways}
        for round_ in range(args.rounds):
            for way in args.ways:
                run = measure(way, args, work, assets)
                runs[way].append(run)
                print(f"round {round_ + 1}  {way:<20}  {run.tokens_per_s:8,.0f} tok/s  {run.cpu_s:6.1f} CPU s"
                      f"{'  (busy)' if run.busy else ''}", flush=True)  # fmt: skip
        text = describe(runs, args)
        print("\n" + text)
        if not args.dry:
            write_section("throughput", text)
        if args.json:
            args.json.write_text(json.dumps({w: [dataclasses.asdict(r) for r in rs] for w, rs in runs.items()}))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="timed, after 5 of warm-up")
    parser.add_argument("--ways", default="", help="comma-separated; default all that can run: " + ", ".join(NAMES))
    parser.add_argument("--peer-python", action="append", default=[], metavar="hf|trl=PYTHON")
    parser.add_argument("--work", type=Path, default=None, help="folder for scratch files")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here too")
    parser.add_argument("--dry", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--profile", type=Path, default=None, help="profile each way once into this folder instead")
    args = parser.parse_args()
    args.python = dict(text.split("=", 1) for text in args.peer_python)
    args.ways = args.ways.split(",") if args.ways else [w for w in NAMES if PEERS.get(w) in (None, *args.python)]
    unknown = set(args.ways) - set(WAYS)
    if unknown:
        parser.error(f"--ways: no such way: {', '.join(sorted(unknown))}")
    return args


def make_assets(work: Path, steps: int) -> dict:
    """Weights and rows that everybody reads, and what dtrain is told; the fields of a Job, without the way."""
    import numpy as np
    import torch

    from dtrain.checkpoint.export import write_export
    from dtrain.config import frozen
    from dtrain.data.collate import collate
    from dtrain.data.order import global_batch_ids
    from dtrain.data.prepare import prepare
    from dtrain.data.store import RowStore
    from dtrain.plan.propose import propose
    from dtrain.plan.settle import settle

    config = propose(_overrides(work, steps, "ddp", "model=tiny"), None).config
    prepared = prepare(config.dataset, config.objective, config.model, config.template, eval_fraction=0.0, seed=SEED,
                       cache=work / "cache", say=print)  # fmt: skip
    bundle = config.model.build(prepared.assets, seed=SEED)
    shapes = {name: tuple(param.shape) for name, param in bundle.module.named_parameters()}
    tensors = ((name, bundle.weights.read(name, 0, param.numel()).view(param.shape))
               for name, param in bundle.module.named_parameters())  # fmt: skip
    write_export(tensors, shapes, work / "model", assets=prepared.assets, dtype="fp32", max_shard_bytes=1e9)

    settled = {}
    for strategy in ("ddp", "fsdp2", "zero3"):
        proposal = propose(_overrides(work, steps, strategy, "model=hf", f"model.path={work / 'model'}"), None)
        settled[strategy] = str(work / f"{strategy}.yaml")
        frozen.write(Path(settled[strategy]), settle(proposal.config, proposal.plan, proposal.strategies,
                                                     prepared.objective, prepared.num_rows))  # fmt: skip

    store = RowStore(prepared.dir / "train.arrow")
    order = [global_batch_ids(SEED, step, SIZE * MICRO, len(store)).tolist() for step in range(steps)]
    used = sorted({i for ids in order for i in ids})
    batch = collate([store.row(i) for i in used], used, prepared.pad_id, pad_to=LENGTH)
    labels = torch.full((len(used) * LENGTH,), -100)
    labels[batch.inputs["target_index"] + 1] = batch.inputs["target_ids"]
    np.savez(work / "rows.npz", tokens=batch.inputs["tokens"], positions=batch.inputs["positions"],
             labels=labels.view(-1, LENGTH))  # fmt: skip
    return {
        "model": str(work / "model"), "rows": str(work / "rows.npz"), "store": str(store.path), "config": settled,
        "order": [[ids[r * MICRO : (r + 1) * MICRO] for r in range(SIZE)] for ids in order],
        "ids": {str(i): at for at, i in enumerate(used)}, "pad_id": prepared.pad_id,
        "num_tokens": sum(len(store.row(i).tokens) for ids in order[WARMUP:] for i in ids),
    }  # fmt: skip


def _overrides(work: Path, steps: int, strategy: str, *model: str) -> list[str]:
    return [
        *model,
        f"strategy={strategy}",
        "dataset=stdlib",
        f"dataset.max_length={LENGTH}",
        f"batch.global_batch={SIZE * MICRO}",
        f"batch.micro_batch={MICRO}",
        f"train.steps={steps}",
        "train.precision=fp32",
        f"train.grad_clip={GRAD_CLIP}",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"optim.lr={LR}",
        f"optim.betas=[{BETAS[0]},{BETAS[1]}]",
        f"optim.weight_decay={WEIGHT_DECAY}",
        "eval.fraction=0",
        "eval.every_steps=0",
        "tracker=[console,jsonl]",
        "device=cpu",
        f"launcher.procs={SIZE}",
        f"run.seed={SEED}",
        f"run.dir={work / 'runs'}",
    ]


def measure(way: str, args: argparse.Namespace, work: Path, assets: dict, *, profile: str | None = None) -> Run:
    """Two fresh processes, from start to end."""
    out = Path(tempfile.mkdtemp(prefix=f"{way}-", dir=work))
    fields = {key: value for key, value in assets.items() if key != "num_tokens"}
    job = Job(way=way, out=str(out), warmup=WARMUP, steps=args.steps, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY,
              grad_clip=GRAD_CLIP, profile=profile, **fields)  # fmt: skip
    (out / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    others = Others()
    _run_ranks(args.python.get(PEERS.get(way, ""), sys.executable), out)
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]
    return Run(
        tokens_per_s=assets["num_tokens"] / ranks[0]["wall_s"],
        step_s=ranks[0]["step_s"],
        cpu_s=sum(rank["cpu_s"] for rank in ranks),
        peak_mb=max(rank["peak_mb"] for rank in ranks),
        busy=others.busy,
        losses=[statistics.fmean(each) for each in zip(*(rank["losses"] for rank in ranks), strict=True)],
        rows=[sorted(chain(*each)) for each in zip(*(rank["rows"] for rank in ranks), strict=True)],
    )


def _run_ranks(python: str, out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
             "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    procs = []
    for rank in range(SIZE):
        env = os.environ | quiet | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        with (out / f"rank-{rank}.log").open("w") as log:
            command = [python, str(Path(__file__).with_name("loops.py")), str(out / "job.json")]
            procs.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=out))
    try:
        codes = [proc.wait(timeout=900) for proc in procs]
    finally:
        for proc in procs:
            proc.kill()
    if any(codes):
        tails = "\n".join(f"--- rank {r}\n" + (out / f"rank-{r}.log").read_text()[-3000:] for r in range(SIZE))
        raise SystemExit(f"{out.name}: exit codes {codes}\n{tails}")


def mismatch(run: Run, floor: Run) -> str:
    """Why a run did other work than the floor; empty where it did the same."""
    for step, (mine, theirs) in enumerate(zip(run.rows, floor.rows, strict=True), 1):
        if mine != theirs:
            return f"mismatch: other tokens in step {step}"
    worst = worst_loss(run, floor)
    return f"mismatch: loss differs by {worst:.1e}" if not worst <= LOSS_TOLERANCE else ""


def worst_loss(run: Run, floor: Run) -> float:
    return max(abs(a - b) for a, b in zip(run.losses, floor.losses, strict=True))


def fast(runs: list[Run]) -> float:
    """The step time that a tenth of all steps are faster than: near what a quiet machine would give."""
    steps = sorted(seconds for run in runs for seconds in run.step_s)
    return steps[len(steps) // 10]


def describe(runs: dict[str, list[Run]], args: argparse.Namespace) -> str:
    reference = (runs.get("bare_ddp") or next(iter(runs.values())))[0]
    head = ["way", "tokens/s", "of its floor", "fast steps", "CPU s", "CPU of floor", "MB per rank", "loss differs by"]
    rows = [_row(way, mine, runs.get(FLOOR.get(way, ""), []), reference) for way, mine in runs.items()]
    num_busy = sum(run.busy for each in runs.values() for run in each)
    total = sum(len(each) for each in runs.values())
    rough = args.rounds < 5 or num_busy > total // 10
    hint = "\n**Rough figures, not a result: few rounds, or a machine with other work.**" if rough else ""
    return f"""## Throughput

{today()}. {machine()}; {versions("torch", "transformers", "deepspeed")}{_peer_versions(args)}.
Load average at the end {load():.1f}; {num_busy} of {total} runs shared the machine with other work.{hint}

dtrain's 6 M model, packed rows of {LENGTH} tokens, fp32, {SIZE} gloo ranks of one thread, {MICRO} rows each, AdamW,
clipping at {GRAD_CLIP:g}. Median and half spread of {args.rounds} interleaved rounds of {args.steps} steps,
after {WARMUP} of warm-up.

{table(head, rows)}

- `of its floor`: tokens/s over those of the bare loop of the same kind in the same round, for the trainers those of
  DistributedDataParallel; the median, and from which to which.
- `fast steps`: the same for the step time that a tenth of the steps beat, which other work on the
  machine changes less.
- `loss differs by`: the most in any step, from the first bare loop. The tokens of each step are compared by a hash.
- The bare loops make all batches before the clock starts, compute whole logits as transformers does, use torch's
  default AdamW, and report nothing. The one with dtrain's head and the fused AdamW shows what dtrain's loop costs.
- The trainers get ready-made batches, no activation checkpointing, no logging, and keep their default, a fused AdamW.

Run it: `python bench/throughput.py`."""


def _row(way: str, mine: list[Run], floors: list[Run], reference: Run) -> list[str]:
    tokens = [run.tokens_per_s for run in mine]
    problem = next(filter(None, (mismatch(run, reference) for run in mine)), "")
    share = quick = share_cpu = ""
    if floors:
        ratios = [run.tokens_per_s / floor.tokens_per_s for run, floor in zip(mine, floors, strict=True)]
        cpu = [run.cpu_s / floor.cpu_s for run, floor in zip(mine, floors, strict=True)]
        share = f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"
        quick, share_cpu = f"{fast(floors) / fast(mine):.3f}", f"{statistics.median(cpu):.3f}"
    if problem:
        share, quick, share_cpu = problem, "", ""
    return [
        NAMES[way],
        f"{statistics.median(tokens):,.0f} {spread(tokens)}",
        share,
        quick,
        f"{statistics.median(run.cpu_s for run in mine):.1f}",
        share_cpu,
        f"{statistics.median(run.peak_mb for run in mine):,.0f}",
        f"{max(worst_loss(run, reference) for run in mine):.0e}",
    ]


def _peer_versions(args: argparse.Namespace) -> str:
    texts = []
    for name, python in args.python.items():
        names = {"hf": "'transformers', 'accelerate'", "trl": "'trl', 'transformers', 'accelerate'"}[name]
        code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in ({names},)))"
        texts.append(
            f"; {name}: " + subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        )
    return "".join(texts)


def profile(args: argparse.Namespace, work: Path, assets: dict) -> int:
    args.profile.mkdir(parents=True, exist_ok=True)
    for way in args.ways:
        measure(way, args, work, assets, profile=str(args.profile.absolute() / f"{way}.txt"))
        print(args.profile / f"{way}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
