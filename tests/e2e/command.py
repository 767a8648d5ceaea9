"""The real command, as a user types it, on small files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["dataset=files", "dataset.max_length=64", "model.hidden=64", "model.layers=2", "model.intermediate=128",
         "model.vocab=400", "model.max_positions=64", "batch.global_batch=8", "train.steps=8", "schedule.warmup_steps=2",
         "optim.lr=5e-3", "eval.fraction=0.1", "eval.every_steps=4", "tracker=[console,jsonl]"]  # fmt: skip
"""The smallest run that learns something in eight steps."""


def dtrain(cwd: Path, *argv: str, python: tuple[str, ...] = (), env: dict[str, str | None] | None = None,
           timeout_s: float = 240) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`dtrain ...` in `cwd`; None in `env` takes a variable away."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, *python, "-m", "dtrain", *argv], cwd=cwd, text=True, capture_output=True,
                          timeout=timeout_s, stdin=subprocess.DEVNULL,
                          env={key: value for key, value in whole.items() if value is not None})  # fmt: skip


def write_texts(path: Path, num: int = 300) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            text = " ".join(f"{_who(draw)} {_does(draw)}." for _ in range(draw.randint(2, 9)))
            file.write(json.dumps({"text": f"{text} {i}"}) + "\n")


def write_chats(path: Path, num: int = 150) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            asked, said = f"Who is number {i}?", f"It is {_who(draw)}, who {_does(draw)}."
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")


def _who(draw: random.Random) -> str:
    return draw.choice(["Ada", "Bo", "Cy", "Di"])


def _does(draw: random.Random) -> str:
    return (
        f"{draw.choice(['sees', 'likes', 'finds', 'takes'])} {draw.choice(['a cat', 'the sea', 'a book', 'the moon'])}"
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def workers_of(run_dir: Path) -> list[int]:
    """Processes that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"worker" in argv and os.fsencode(run_dir) in argv:
                found.append(int(entry.name))
    return found


def kill_together(pids: Iterable[int]) -> None:
    """As a machine is lost: none of them sees another end first, which would have it save or say so."""
    pids = list(pids)
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, signum)
