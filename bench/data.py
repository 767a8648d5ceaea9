"""How fast data is prepared, how full rows are, how long training waits for them, and what it takes of memory.

    python bench/data.py            # some 25 minutes on 2 cores, 8 GB of disk
    python bench/data.py --gb 0     # without the large file: some 10 minutes

What is compared runs in turn, in the same process tree on the same cores. Text is put together from the files in
../shared/data where that folder is, else from the sources of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from report import Others, cores, load, machine, table, today, versions, write_section

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB = 32_000
LENGTHS = (512, 1024, 2048, 4096)
BATCH = 1000
"""Texts that the bare tokenizer gets at a time."""


def main() -> int:
    args = _parse()
    others = Others()
    work = Path(tempfile.mkdtemp(prefix="dtrain-data-", dir=args.work))
    try:
        words = _words()
        assets = make_assets(work, words)
        sections = [
            tokenising(work, assets, words, args.mb, args.rounds),
            filling(work, assets),
            waiting(work, assets, words, args.steps),
            *([large(work, assets, words, args.gb)] if args.gb else []),
        ]
        text = describe(sections, rough=others.busy)
        print("\n" + text)
        if not args.dry:
            write_section("data", text)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200, help="of text for the rates of tokenising")
    parser.add_argument("--rounds", type=int, default=3, help="of each way of tokenising, in turn")
    parser.add_argument("--steps", type=int, default=40, help="of training, for what it waits")
    parser.add_argument("--gb", type=float, default=2, help="of JSON lines, for memory and for a warm start; 0 is none")
    parser.add_argument("--work", type=Path, default=None, help="folder for scratch files")
    parser.add_argument("--dry", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args()


def _words() -> list[str]:
    if SHARED.is_dir():
        lines = (SHARED / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines] + [(SHARED / "wiki_demo.txt").read_text(encoding="utf-8")]
    else:
        from dtrain.datasets.stdlib import Stdlib

        texts = [text for example in Stdlib().examples() for text in example.texts()]
    return [word for word in " ".join(texts).split(" ") if word.strip()]


def make_assets(work: Path, words: list[str]) -> Path:
    """A model's folder with a tokenizer of a usual size."""
    from dtrain.models._tokenizer import train_tokenizer
    from dtrain.models.tiny import Tiny

    folder = work / "model"
    folder.mkdir()
    train_tokenizer([" ".join(words)], VOCAB, folder, 4096)
    config = Tiny(vocab=VOCAB)._config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_text(path: Path, words: list[str], num_bytes: float) -> Path:
    """JSON lines: documents of some 250 words in the median, put together from runs of 25 words of the real text."""
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            num = int(min(max(draw.lognormvariate(5.5, 1.0), 5), 4000))
            starts = [draw.randrange(len(words) - 25) for _ in range(-(-num // 25))]
            text = " ".join(" ".join(words[start : start + 25]) for start in starts)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def tokenising(work: Path, assets: Path, words: list[str], mb: float, rounds: int) -> str:
    path = write_text(work / "text.jsonl", words, mb * 1e6)
    ways: dict[str, Callable[[], float]] = {
        "tokenizers, batches in memory": partial(_bare, path, assets),
        "dtrain, from the file to token ids on disk": partial(_encode, path, assets, work),
        "dtrain, from the file to packed rows": partial(_prepare, path, assets, work),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
            print(
                f"round {round_ + 1}  {name:<44} {rates[name][-1] / 1e3:7.0f} k tokens/s  load {load():.1f}", flush=True
            )
    path.unlink()
    bare = next(iter(rates.values()))
    rows = []
    for name, found in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(found, bare, strict=True)]
        rows.append([name, f"{statistics.median(found) / 1e3:,.0f}", f"**{statistics.median(ratios):.3f}** "
                     f"({min(ratios):.3f} to {max(ratios):.3f})"])  # fmt: skip
    return "\n".join([
        f"Tokenising {mb:g} MB of text, vocabulary of {VOCAB:,}, {cores()} cores; median of {rounds} rounds in turn. "
        f"The bare call is `encode_batch_fast` of {BATCH} texts at a time, with its own threads, without reading or "
        f"keeping anything; dtrain's times begin with the start of its processes.",
        "",
        table(["way", "k tokens/s", "of the bare call"], rows),
    ])  # fmt: skip


def _bare(path: Path, assets: Path) -> float:
    """Tokens a second."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    began, num = time.perf_counter(), 0
    for i in range(0, len(texts), BATCH):
        num += sum(len(one) for one in tokenizer.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False))
    return num / (time.perf_counter() - began)


def _encode(path: Path, assets: Path, work: Path) -> float:
    from dtrain.data.documents import Documents
    from dtrain.data.encode import Encoder, Limit, encode_all
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.datasets.badrows import BadRows
    from dtrain.datasets.files import Files
    from dtrain.objectives.pretrain import Pretrain

    dataset, load_it = Files(path=str(path), max_length=2048), partial(TextTokenizer.load, assets)
    encoder = Encoder(Pretrain(), load_it, Limit(2048, "split"), 0)
    with Documents(work / "documents") as documents:
        began = time.perf_counter()
        encode_all(dataset.examples(), encoder, load_it(), documents, bad=BadRows.of(dataset), tell=lambda line: None)
        return int(documents.lengths.sum()) / (time.perf_counter() - began)


def _prepare(path: Path, assets: Path, work: Path) -> float:
    began = time.perf_counter()
    prepared = prepare_file(path, assets, work / "cache", max_length=2048)
    took = time.perf_counter() - began
    shutil.rmtree(work / "cache")
    return prepared.num_tokens / took


def prepare_file(
    path: Path, assets: Path, cache: Path, say: Callable[[str], None] = lambda line: None, **values: object
):
    from dtrain.data.prepare import prepare
    from dtrain.datasets.files import Files
    from dtrain.models.hf import HF
    from dtrain.objectives.auto import Auto
    from dtrain.templates.jinja import Jinja

    dataset = Files(path=str(path), **values)
    return prepare(
        dataset,
        Auto(),
        HF(path=str(assets), from_scratch=True),
        Jinja(),
        eval_fraction=0.0,
        seed=0,
        cache=cache,
        say=say,
    )


def filling(work: Path, assets: Path) -> str:
    """How full the rows of the real files are."""
    if SHARED.is_dir():
        files = sorted(path for path in SHARED.iterdir() if path.suffix in (".json", ".jsonl", ".txt", ".csv"))
    else:
        files = [write_text(work / "generated.jsonl", _words(), 2e6)]
    rows, sums = [], {length: [0, 0, 0] for length in LENGTHS}
    for path in files:
        row = [path.name]
        for length in LENGTHS:
            prepared = prepare_file(path, assets, work / "cache", max_length=length)
            row.append(f"{prepared.fill:.1%} of {prepared.num_rows:,} ({prepared.most_fill:.1%})")
            room, fewest = prepared.num_rows * length, prepared.num_tokens / prepared.most_fill
            for i, num in enumerate((prepared.num_tokens, room, fewest)):
                sums[length][i] += num
        print("  ".join(row), flush=True)
        rows.append(row)
    rows.append(["all together", *(f"**{num / room:.1%}** ({num / least:.1%})" for num, room, least in sums.values())])
    shutil.rmtree(work / "cache")
    return "\n".join([
        "Packing: how much of the rows is tokens, of how many rows, and in brackets what no packing of these documents "
        "is above (`dtrain.data.pack.fewest_rows`): two documents of more than half a row share none, three of more "
        "than a third neither. The last row of a file is seldom full, which shows where there are few.",
        "",
        table(["file", *(f"rows of {length:,}" for length in LENGTHS)], rows),
    ])  # fmt: skip


def waiting(work: Path, assets: Path, words: list[str], steps: int) -> str:
    """What two ranks wait for their batches in each step of a real run."""
    path = write_text(work / "train.jsonl", words, 4e6)
    rows = []
    for packing in ("true", "false"):
        run = work / f"run-{packing}"
        command = [
            sys.executable, "-m", "dtrain", "launch", "strategy=ddp", "launcher.procs=2", "device=cpu", "model=tiny",
            "dataset=files", f"dataset.path={path}", "dataset.max_length=512", f"dataset.packing={packing}",
            f"train.steps={steps}", "batch.global_batch=8", "batch.micro_batch=4", "eval.fraction=0",
            "tracker=[jsonl]", "checkpoint.at_end=false", f"run.dir={run.parent}", f"run.name={run.name}",
            f"run.cache={work / 'cache'}",
        ]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][3:]
        shares = [one["data_s"] / one["step_s"] for one in found]
        padding = next((line.split()[1] for line in done.stdout.splitlines() if "is padding" in line), "none")
        rows.append(["packed" if packing == "true" else "one document a row, like lengths together",
                     f"{statistics.median(one['step_s'] for one in found):.3f}",
                     f"{statistics.median(one['data_s'] for one in found) * 1e3:.2f}",
                     f"**{statistics.median(shares):.3%}**", f"{max(shares):.2%}", padding])  # fmt: skip
        print("  ".join(rows[-1]), flush=True)
    return "\n".join([
        f"What 2 gloo ranks wait for batches, in the steps of a run of {steps} (dtrain's 6 M model, rows of up to 512 "
        f"tokens, 4 a rank); the longest wait of any rank in a step.",
        "",
        table(["rows", "step, s", "wait, ms", "of the step", "at most", "padding"], rows),
    ])  # fmt: skip


LARGE = """
import sys
import time

sys.path.insert(0, sys.argv[1])
from pathlib import Path

from data import prepare_file

if __name__ == "__main__":
    path, assets, cache = map(Path, sys.argv[2:])
    began = time.perf_counter()
    prepared = prepare_file(path, assets, cache, print, max_length=2048)
    rows = [prepared.rows(name) for name in ("train.arrow", "eval.arrow")]
    print("took", time.perf_counter() - began, prepared.num_tokens)
"""


def large(work: Path, assets: Path, words: list[str], gb: float) -> str:
    """Memory while a large file is prepared, and the time of a start that finds it prepared."""
    path = write_text(work / "large.jsonl", words, gb * 1e9)
    script = work / "large.py"
    script.write_text(LARGE)
    argv = [sys.executable, str(script), str(Path(__file__).parent), str(path), str(assets), str(work / "cache")]
    cold, tokens, tree, parent = _watched(argv)
    print(f"{gb:g} GB: {cold:.0f} s, {tokens / 1e6:,.0f} M tokens, {tree / 1e6:,.0f} MB in all", flush=True)
    warm = [_watched(argv)[0] for _ in range(5)]
    files = sum(file.stat().st_size for file in (work / "cache").rglob("*.arrow"))
    rows = [
        ["JSON lines, GB", f"{path.stat().st_size / 1e9:.2f}"],
        ["tokens, M", f"{tokens / 1e6:,.0f}"],
        ["rows on disk, GB", f"{files / 1e9:.2f}"],
        ["first start, s", f"{cold:,.0f}"],
        [f"most memory of all {cores() + 1} processes together, MB", f"**{tree / 1e6:,.0f}**"],
        ["of these the one that packs and writes, MB", f"{parent / 1e6:,.0f}"],
        [
            "later start: to find the rows and open them, s",
            f"**{statistics.median(warm):.2f}** (at most {max(warm):.2f})",
        ],
    ]
    return "\n".join(["A large file. Memory is resident memory, shared pages counted for each process.", "",
                      table(["", ""], rows)])  # fmt: skip


def _watched(argv: list[str]) -> tuple[float, int, int, int]:
    """Seconds, tokens, and the most memory of the process and its children together, and of the process."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    most = [0, 0]

    def watch() -> None:
        while process.poll() is None:
            try:
                parent = psutil.Process(process.pid)
                sizes = [one.memory_info().rss for one in [parent, *parent.children(recursive=True)]]
            except psutil.Error:
                continue
            most[0], most[1] = max(most[0], sum(sizes)), max(most[1], sizes[0])
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {process.returncode}")
    _, took, tokens = lines[-1].split()
    return float(took), int(tokens), most[0], most[1]


def describe(sections: list[str], *, rough: bool) -> str:
    about = (
        f"{today()}. {machine()}; {versions('tokenizers', 'pyarrow', 'numpy')}. Load average at the end {load():.1f}."
    )
    lines = ["## Data", "", about]
    if rough:
        lines.append("**Rough figures, not a result: the machine had other work.**")
    for section in sections:
        lines += ["", section]
    return "\n".join([*lines, "", "Run it: `python bench/data.py`."])


if __name__ == "__main__":
    sys.exit(main())
