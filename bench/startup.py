"""How long dtrain takes to answer, and to reach its first step beside a bare torchrun script.

    python bench/startup.py

The first step is that of two gloo ranks on CPU, one thread each, from a model folder on disk; dtrain's data is
prepared. Both start in turn; what counts is the time until rank 0 has written a file after its first update.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import cores, load, machine, table, today, versions, write_section
from throughput import LENGTH, MICRO, SIZE, make_assets

VERBS = {"dtrain --help": ["--help"], "dtrain plan": ["plan"], "dtrain config show": ["config", "show"]}
FOREIGN = ("torch", "transformers", "deepspeed")


def main() -> int:
    args = _parse()
    work = Path(tempfile.mkdtemp(prefix="dtrain-startup-", dir=args.work))
    try:
        answers = {name: answer(argv, args.answers, work) for name, argv in VERBS.items()}
        for name, (best, imported) in answers.items():
            print(f"{name:<20} {best:.3f} s  imports {imported or 'none'} of {', '.join(FOREIGN)}", flush=True)
        starts = first_steps(args.rounds, work) if args.rounds else {}
        text = describe(answers, starts)
        print("\n" + text)
        if not args.dry:
            write_section("startup", text)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=7, help="times that each verb is run")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind")
    parser.add_argument("--work", type=Path, default=None, help="folder for scratch files")
    parser.add_argument("--dry", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args()


def answer(argv: list[str], times: int, work: Path) -> tuple[float, str]:
    """The best wall time of a verb, and which heavy packages it imported."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dtrain", *argv], check=True, stdout=subprocess.DEVNULL, cwd=work)
        best = min(best, time.perf_counter() - began)
    code = (f"import sys; from dtrain.cli import run; run({argv!r}); "
            f"sys.stderr.write(' '.join(m for m in {FOREIGN!r} if m in sys.modules))")  # fmt: skip
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=work)
    return best, seen.stderr.strip()


def first_steps(rounds: int, work: Path) -> dict[str, list[float]]:
    """Seconds to the first step, of each start in turn; one round before the first warms up and is not counted."""
    assets = make_assets(work, steps=1)
    starts = {
        "bare torchrun script": lambda run: _bare(run, assets),
        "dtrain launch": lambda run: _dtrain(run, assets, work, "tracker=[console,jsonl,wandb]"),
        "dtrain launch, no wandb": lambda run: _dtrain(run, assets, work, "tracker=[console,jsonl]"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for round_ in range(rounds + 1):
        for at, (name, start) in enumerate(starts.items()):
            took = start(work / f"run-{round_}-{at}")
            print(f"{'warm-up' if round_ == 0 else f'round {round_}':<8} {name:<24} {took:6.2f} s  load {load():.1f}",
                  flush=True)  # fmt: skip
            if round_:
                seconds[name].append(took)
    return seconds


def _bare(run: Path, assets: dict) -> float:
    run.mkdir()
    script = Path(__file__).with_name("first_step.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
               f"--nproc-per-node={SIZE}", str(script), assets["model"], assets["rows"], str(run / "done")]  # fmt: skip
    return _time_to(command, run / "done")


def _dtrain(run: Path, assets: dict, work: Path, tracker: str) -> float:
    command = [
        sys.executable, "-m", "dtrain", "launch", "strategy=ddp", f"launcher.procs={SIZE}", "model=hf",
        f"model.path={assets['model']}", f"dataset.max_length={LENGTH}", "train.steps=1", "device=cpu",
        f"batch.global_batch={SIZE * MICRO}", f"batch.micro_batch={MICRO}", "schedule=constant",
        "schedule.warmup_steps=0", "eval.max_rows=1", tracker,
        f"run.dir={run.parent}", f"run.name={run.name}", f"run.cache={work / 'cache'}",
    ]  # fmt: skip
    return _time_to(command, run / "metrics.jsonl")


def _time_to(command: list[str], file: Path) -> float:
    """Seconds until `file` was last written; it is written once, after the first step."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=file.parent.parent)
    if done.returncode or not file.exists():
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    return file.stat().st_mtime - began


def describe(answers: dict[str, tuple[float, str]], starts: dict[str, list[float]]) -> str:
    rows = [[f"`{name}`", f"{best:.3f}", "yes" if "torch" in seen else "no"] for name, (best, seen) in answers.items()]
    lines = [
        "## Start-up",
        "",
        f"{today()}. {machine()}; {versions('torch', 'transformers')}. Load average at the end {load():.1f} on "
        f"{cores()} cores.",
        "",
        table(["command", "best wall time, s", "imports torch"], rows),
    ]
    if load() > cores() + 0.5:
        lines[3:3] = ["**Rough figures, not a result: the machine had other work.**"]
    if starts:
        bare = starts["bare torchrun script"]
        rows = []
        for name, seconds in starts.items():
            ratios = [mine / theirs for mine, theirs in zip(seconds, bare, strict=True)]
            rows.append(
                [name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{statistics.median(ratios):.2f}"]
            )
        lines += [
            "",
            f"To the first step: {SIZE} gloo ranks, DDP, the same model folder; median of {len(bare)} rounds, in turn. "
            f"dtrain's time includes its plan, the check of its prepared data, and the trackers.",
            "",
            table(["start", "median, s", "best, s", "of the bare script"], rows),
        ]
    return "\n".join([*lines, "", "Run it: `python bench/startup.py`."])


if __name__ == "__main__":
    sys.exit(main())
