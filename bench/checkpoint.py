"""Speed of checkpoints: beside plain reads and writes of the same bytes, and beside what torch and DeepSpeed save with.

    python bench/checkpoint.py               # a state of 0.76 GB; some 15 minutes
    python bench/checkpoint.py --size small  # to see that it runs: a minute

Two gloo ranks on CPU with one thread each, fp32, AdamW. Everything that is compared takes turns on one disk: plain and
dtrain within the same processes, the ways to save while training in rounds, A B C A B C.
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
from collections.abc import Callable, Sequence
from pathlib import Path

from report import Others, cores, load, machine, table, today, versions, write_section
from saves import Job

SIZE, MICRO, LENGTH = 2, 1, 64
MODELS = {
    "small": ["model.hidden=256", "model.layers=4", "model.intermediate=768", "model.vocab=8192"],
    "large": ["model.hidden=768", "model.layers=8", "model.heads=12", "model.kv_heads=4", "model.intermediate=2048",
              "model.vocab=16384"],
}  # fmt: skip
NAMES = {
    "dtrain_fsdp2": "dtrain, fsdp2",
    "dcp_fsdp2": "`torch.distributed.checkpoint.async_save`, fully_shard",
    "dcp_fsdp2_kept": "the same, with a stager that is kept",
    "dtrain_zero3": "dtrain, zero3",
    "deepspeed_zero3": "DeepSpeed `save_checkpoint`, stage 3",
}
PEER_NAMES = {
    "dcp_fsdp2": "`async_save`",
    "dcp_fsdp2_kept": "`async_save` with a kept stager",
    "deepspeed_zero3": "`save_checkpoint`",
}
PEERS = {"dtrain_fsdp2": ("dcp_fsdp2", "dcp_fsdp2_kept"), "dtrain_zero3": ("deepspeed_zero3",)}
Ranks = list[dict]


def main() -> int:
    args = _parse()
    work = Path(tempfile.mkdtemp(prefix="dtrain-checkpoint-", dir=args.work))
    try:
        assets = make_assets(work, args)
        others = Others()
        stored = measure("storage", args, work, assets)
        busy = [others.busy]
        print("storage", {name: _median(seconds) for name, seconds in stored[0]["seconds"].items()}, flush=True)
        runs: dict[str, list[Ranks]] = {way: [] for way in args.ways}
        for round_ in range(args.rounds):
            for way in args.ways:
                others = Others()
                ranks = measure(way, args, work, assets)
                busy.append(others.busy)
                runs[way].append(ranks)
                print(f"round {round_ + 1}  {way:<16}  step {_most(ranks, 'step_s'):.2f} s  waited "
                      f"{_most(ranks, 'pauses'):.3f} s  lost {_most(ranks, 'lost'):.2f} s"
                      f"{'  (busy)' if busy[-1] else ''}", flush=True)  # fmt: skip
        text = describe(stored, runs, busy, args)
        print("\n" + text)
        if not args.dry:
            write_section("checkpoint", text)
        if args.json:
            args.json.write_text(json.dumps({"storage": stored, **runs}))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(MODELS), default="large")
    parser.add_argument("--storage-rounds", type=int, default=9, help="writes and reads of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each way to save while training")
    parser.add_argument("--ways", default=",".join(NAMES), help="to save while training, comma-separated (all)")
    parser.add_argument("--saves", type=int, default=3, help="of each start; the first is shown by itself")
    parser.add_argument("--cycle", type=int, default=5, help="steps that a save has to be written in")
    parser.add_argument("--work", type=Path, default=None, help="folder for scratch files, and so the disk")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here too")
    parser.add_argument("--dry", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args()
    args.ways = [way for way in NAMES if way in args.ways.split(",")]
    if args.saves < 2:
        parser.error("--saves: at least 2, the first is shown by itself")
    return args


def make_assets(work: Path, args: argparse.Namespace) -> dict:
    """What all ways need of the same model: the fields of a Job, without the way and its folder."""
    from dtrain.config import frozen
    from dtrain.data.prepare import prepare
    from dtrain.plan.propose import propose
    from dtrain.plan.settle import settle

    job = Job(way="", out="", config={}, assets="", rows="", pad_id=0, micro_batch=MICRO, length=LENGTH,
              rounds=args.storage_rounds, saves=args.saves, cycle=args.cycle)  # fmt: skip
    texts = work / "texts.jsonl"
    words = "a quick brown fox jumps over some lazy dog and says nothing of it to anybody"
    texts.write_text("".join(json.dumps({"text": f"{i} {words} " * 8}) + "\n" for i in range(300)))
    for strategy in ("fsdp2", "zero3"):
        proposal = propose([
            "model=tiny", *MODELS[args.size], f"strategy={strategy}", "dataset=files", f"dataset.path={texts}",
            f"dataset.max_length={LENGTH}", f"batch.global_batch={SIZE * MICRO}", f"batch.micro_batch={MICRO}",
            f"train.steps={job.steps}", "train.precision=fp32", "schedule=constant", "schedule.warmup_steps=0",
            "eval.fraction=0", "device=cpu", f"launcher.procs={SIZE}", f"run.dir={work / 'runs'}",
            "checkpoint.keep_last=1",
        ], None)  # fmt: skip
        config = proposal.config
        prepared = prepare(config.dataset, config.objective, config.model, config.template, eval_fraction=0.0, seed=0,
                           cache=work / "cache", say=print)  # fmt: skip
        path = work / f"{strategy}.yaml"
        frozen.write(path, settle(config, proposal.plan, proposal.strategies, prepared.objective, prepared.num_rows))
        job.config[strategy] = str(path)
    fields = dataclasses.asdict(job) | {
        "assets": str(prepared.assets), "rows": str(prepared.dir), "pad_id": prepared.pad_id,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if name not in ("way", "out")}


def measure(way: str, args: argparse.Namespace, work: Path, assets: dict) -> Ranks:
    """Two fresh processes, from start to end."""
    out = Path(tempfile.mkdtemp(prefix=f"{way}-", dir=work))
    (out / "job.json").write_text(json.dumps(dataclasses.asdict(Job(way=way, out=str(out), **assets))))
    _run_ranks(out)
    found = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]
    shutil.rmtree(out)
    os.sync()
    return found


def _run_ranks(out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    procs = []
    for rank in range(SIZE):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with (out / f"rank-{rank}.log").open("w") as log:
            command = [sys.executable, str(Path(__file__).with_name("saves.py")), str(out / "job.json")]
            procs.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=out))
    try:
        codes = [proc.wait(timeout=1800) for proc in procs]
    finally:
        for proc in procs:
            proc.kill()
    if any(codes):
        tails = "\n".join(f"--- rank {r}\n" + (out / f"rank-{r}.log").read_text()[-3000:] for r in range(SIZE))
        raise SystemExit(f"{out.name}: exit codes {codes}\n{tails}")


def describe(stored: Ranks, runs: dict[str, list[Ranks]], busy: list[bool], args: argparse.Namespace) -> str:
    rough = sum(busy) > len(busy) // 10 or args.size != "large" or args.rounds < 3 or len(runs) < len(NAMES)
    hint = (
        "\n**Rough figures, not a result: few rounds, a small state, or a machine with other work.**" if rough else ""
    )
    one, num = stored[0], stored[0]["num_params"]
    held = "forgot all of it" if one["held"] == 0 else f"still held up to {one['held']:.0%} of it"
    return f"""## Checkpoints

{today()}. {machine()}; {versions("torch", "deepspeed")}. Load average at the end {load():.1f} on {cores()} cores;
{sum(busy)} of {len(busy)} measurements shared the machine with other work.{hint}

{num / 1e6:,.1f} M parameters in fp32 with AdamW, {SIZE} gloo ranks of one thread, one disk. A checkpoint is
{one["bytes"] / 1e9:,.3f} GB: **{one["bytes"] / num:.3f} bytes a parameter**, against 12 of the weight and two moments.

### Against plain reads and writes

As many processes, the same bytes, in pieces of 16 MiB; by turns, {args.storage_rounds} times. Median, and from which
to which. Ratios are of the two in one round.

{table(["", "plain, GB/s", "dtrain, GB/s", "of plain"], _storage_rows(one))}

- A save has digests, flushes files and folders, and renames. The plain write is flushed too.
- A resume reads headers, fills the shards of every parameter and works out the digest of every file on the way. The
  plain read fills memory of the same size.
- Cold: the page cache was told to forget the files before (`posix_fadvise`), and by `mincore` it {held}.

### While it trains

Steps of {MICRO} row of {LENGTH} tokens a rank. {args.saves} saves a start, {
        args.rounds
    } starts by turns, the slower rank
counts. Median, and from which to which.

{
        table(
            [
                "",
                "step, s",
                "first save: waits, s",
                "further: waits, s",
                "written after, s",
                "training lost, s",
                "MB per rank",
                "bytes a parameter",
            ],
            [_training_row(way, each, num) for way, each in runs.items()],
        )
    }

{_training_ratios(runs)}

- *waits*: from the end of a step until training goes on. The first save makes the memory that is copied to; dtrain
  and a kept stager keep it.
- *written after*: until all is on disk and committed. torch flushes its files too, DeepSpeed does not, and neither
  has digests.
- *training lost*: how much longer {args.cycle} steps take with a save at their beginning than without, so both the wait
  and what the writing takes from the steps: with as many ranks as cores, every thread that writes does.

Run it: `python bench/checkpoint.py`."""


def _storage_rows(one: dict) -> list[list[str]]:
    seconds, gb = one["seconds"], one["bytes"] / 1e9
    rows = []
    for title, plain, ours in (("write, flushed", "write", "save"), ("read, cold", "cold read", "cold resume"),
                               ("read, warm", "warm read", "warm resume")):  # fmt: skip
        ratios = [p / o for p, o in zip(seconds[plain], seconds[ours], strict=True)]
        rows.append([title, *(_range([gb / s for s in seconds[name]], ".2f") for name in (plain, ours)),
                     _range(ratios, ".2f", bold=True)])  # fmt: skip
    return rows


def _training_row(way: str, starts: list[Ranks], num_params: int) -> list[str]:
    first, further = _both(starts, "pauses")
    lost = _both(starts, "lost")[1]
    late = max(rank["late"] for ranks in starts for rank in ranks)
    return [
        NAMES[way],
        f"{_median([_most(ranks, 'step_s') for ranks in starts]):.2f}",
        _range(first, ".2f"),
        _range(further, ".2f", bold=True),
        _range(_both(starts, "written")[1], ".2f")
        + (" (and beyond the steps)" if late > 0.1 * starts[0][0]["step_s"] else ""),
        _range(lost, ".2f"),
        f"{_median([_most(ranks, 'peak_mb') for ranks in starts]):,.0f}",
        f"{starts[0][0]['bytes'] / num_params:.2f}",
    ]


def _training_ratios(runs: dict[str, list[Ranks]]) -> str:
    lines = []
    for way, peer in ((way, peer) for way, peers in PEERS.items() for peer in peers if {way, peer} <= {*runs}):
        both = zip(_further_waits(runs[way]), _further_waits(runs[peer]), strict=True)
        ratios = [mine / theirs for mine, theirs in both]
        lines.append(
            f"- {NAMES[way]} waits {_range(ratios, '.2f', bold=True)} of the time that {PEER_NAMES[peer]} waits."
        )
    return "\n".join([*lines, "- Those ratios are of further saves: of the medians of each start, round by round."])


def _further_waits(starts: list[Ranks]) -> list[float]:
    return [_median(_both([ranks], "pauses")[1]) for ranks in starts]


def _both(starts: list[Ranks], name: str) -> tuple[list[float], list[float]]:
    """Of the first save of each start, and of the others; of the slower rank."""
    slower = [[max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for ranks in starts]
    return [one[0] for one in slower], [value for one in slower for value in one[1:]]


def _most(ranks: Ranks, name: str) -> float:
    return max(_median(rank[name]) if isinstance(rank[name], list) else rank[name] for rank in ranks)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _range(values: Sequence[float], form: str, *, bold: bool = False) -> str:
    show: Callable[[float], str] = lambda value: format(value, form)  # noqa: E731
    middle = f"**{show(_median(values))}**" if bold else show(_median(values))
    return f"{middle} ({show(min(values))} to {show(max(values))})"


if __name__ == "__main__":
    sys.exit(main())
