"""The faults of docs/reliability.md done to a plain script around transformers' Trainer: what it does, as measured.

Writes bench/trainer_faults.json, which `make faults` puts beside what dtrain does. Needs accelerate, and root for the
small disk.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

TO = Path(__file__).with_suffix(".json")
STEPS = 8
Patch = Callable[[], None]


def train(out: Path, steps: int = STEPS, rows: int = 64, save_every: int = 1, step_s: float = 0.0) -> None:
    """The script: it saves, and goes on from what it finds, as the documentation of transformers shows."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Slowly(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(step_s)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with (out / f"steps-{os.environ.get('RANK', '0')}").open("a") as file:
                file.write(f"{state.global_step}\n")

    out.mkdir(exist_ok=True, parents=True)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=56,
            max_position_embeddings=32,
        )
    )
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (rows, 32), generator=draw)
    arguments = TrainingArguments(
        str(out), max_steps=steps, save_steps=save_every, save_total_limit=2, per_device_train_batch_size=4,
        logging_steps=1, learning_rate=5e-3, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[Slowly()])
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
    trainer.save_model(str(out / "final"))


class Ended(NamedTuple):
    code: int
    said: str

    @property
    def warned(self) -> str:
        """Whether it said that something is not as before."""
        words = ("do not match", "mismatch", "differ", "has changed")
        return "and says so" if any(word in self.said for word in words) else "unsaid"

    @property
    def last(self) -> str:
        """The last line that says something, cut, and with names of files alone."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return re.sub(r"/\S*/", "", lines[-1])[:80] if lines else ""


def child(log: Path, patch: Patch | None, out: Path, how: dict[str, Any]) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    if patch is not None:
        patch()
    train(out, **how)


def start(out: Path, patch: Patch | None = None, **how: Any) -> tuple[Any, Path]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.trainer", "transformers.models.qwen2.modeling_qwen2", "accelerate"]
    )
    log = out.parent / f"{out.name}.log"
    process = context.Process(target=child, args=(log, patch, out, how))
    process.start()
    return process, log


def run(out: Path, patch: Patch | None = None, **how: Any) -> Ended:
    process, log = start(out, patch, **how)
    process.join(120)
    process.kill()
    process.join()
    return Ended(process.exitcode, log.read_text(errors="replace"))


def steps_of(out: Path, rank: int = 0) -> list[int]:
    path = out / f"steps-{rank}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))


def newest(out: Path) -> Path:
    return out / f"checkpoint-{saved(out)[-1]}"


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "final" / "model.safetensors")


class Rows:
    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, dict[str, str]()
        self.ended = run(folder / "whole")
        assert self.ended.code == 0, self.ended.said
        self.whole = weights(folder / "whole")

    def cut(self, name: str, at: int = 5) -> Path:
        """A run that was killed as it began its save of step `at`."""
        out = self.folder / name
        assert run(out, kill_in_save(at, "_save_checkpoint")).code == -signal.SIGKILL
        return out

    def again(self, out: Path, **how: Any) -> str:
        """What the same script does then."""
        began_with, before = saved(out), len(steps_of(out))
        self.ended = ended = run(out, **how)
        if ended.code != 0:
            return f"does not go on: {ended.last}"
        first = steps_of(out)[before]
        where = f"goes on from step {first - 1}" if began_with else "begins anew"
        mine = weights(out)
        apart = max(float(np.abs(mine[name] - whole).max()) for name, whole in self.whole.items())
        return f"{where}, {'the same weights' if apart == 0 else f'exit 0, other weights (up to {apart:.1g} apart)'}"

    def add(self, number: str, told: str) -> None:
        print(f"{number}: {told}", flush=True)
        self.said[number] = told


class kill_in_save:
    """For a process that is started: kill -9 as one of Trainer's methods begins, in the save of step `at`."""

    def __init__(self, at: int, method: str) -> None:
        self.at, self.method = at, method

    def __call__(self) -> None:
        from transformers import Trainer

        plain = getattr(Trainer, self.method)

        def method(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(trainer, *args, **kwargs)

        setattr(Trainer, self.method, method)


def kill_half_written() -> None:
    """In the middle of optimizer.pt of step 5."""
    import torch

    plain = torch.save

    def save(what: Any, to: Any, *args: Any, **kwargs: Any) -> None:
        plain(what, to, *args, **kwargs)
        if "checkpoint-5" in str(to) and str(to).endswith("optimizer.pt"):
            os.truncate(to, Path(to).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def kill_before_state() -> None:
    from transformers.trainer_callback import TrainerState

    plain = TrainerState.save_to_json

    def save(self: Any, path: str) -> None:
        if "checkpoint-5" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, path)

    TrainerState.save_to_json = save


def kill_in_removal() -> None:
    plain = shutil.rmtree

    def remove(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "checkpoint-3":
            (Path(path) / "trainer_state.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        plain(path, *args, **kwargs)

    shutil.rmtree = remove


def not_a_number() -> None:
    from transformers import Trainer

    plain = Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.state.global_step == 3:
            loss = loss * float("nan")
        return loss

    Trainer.compute_loss = compute_loss


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) - 1 - len(raw) // 16 * 4] ^= 4  # of a number's exponent
    path.write_bytes(raw)


def of_saves(rows: Rows) -> None:
    rows.add("1", rows.again(rows.cut("before")))
    for number, name, patch in (("2", "half", kill_half_written), ("3", "state", kill_before_state)):
        out = rows.folder / name
        assert run(out, patch).code == -signal.SIGKILL
        rows.add(number, rows.again(out))
    out = rows.folder / "removal"
    assert run(out, kill_in_removal).code == -signal.SIGKILL
    rows.add(
        "6", f"{rows.again(out)}; what was half removed {'stays' if (out / 'checkpoint-3').exists() else 'is gone'}"
    )
    out = rows.cut("truncated")
    os.truncate(newest(out) / "model.safetensors", 1000)
    rows.add("8", rows.again(out))
    out = rows.cut("flipped")
    flip(newest(out) / "model.safetensors")
    rows.add("9", f"not found: {rows.again(out)}")
    out = rows.cut("missing")
    (newest(out) / "optimizer.pt").unlink()
    rows.add("10", f"without optimizer.pt: {rows.again(out)}")


def of_disks(rows: Rows) -> None:
    disk = rows.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", disk], capture_output=True).returncode:
        return
    try:
        out = disk / "out"
        ended = run(out)
        left = sorted(path.name for path in newest(out).iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        rows.add("13", f"exit {ended.code}: {ended.last}; leaves {newest(out).name} with {len(left)} files; "
                       f"with room again: {rows.again(out)}")  # fmt: skip
    finally:
        subprocess.run(["umount", disk], check=True)


def of_signals(rows: Rows) -> None:
    for number, signum in (("16", signal.SIGTERM), ("18", signal.SIGINT)):
        out = rows.folder / f"signal-{number}"
        process, log = start(out, save_every=3, step_s=0.2)
        while len(steps_of(out)) < 5:
            time.sleep(0.02)
        os.kill(process.pid, signum)
        process.join(30)
        lost = steps_of(out)[-1] - saved(out)[-1]
        lines = log.read_text().count("\n  File ")
        rows.add(number, f"ends with {process.exitcode} without a save; steps since the last one are lost ({lost} here)"
                         + (f"; a traceback of {lines} calls" if lines else ""))  # fmt: skip


def of_two(rows: Rows) -> None:
    out = rows.folder / "two"
    both = [start(out, step_s=0.1)[0] for _ in range(2)]
    for process in both:
        process.join(120)
    rows.add("12", f"both write into one folder, and end with {[process.exitcode for process in both]}")


def torchrun(out: Path, size: int = 2, **how: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__,
            str(out), json.dumps(how)]  # fmt: skip
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def pid_of(rank: int, below: int) -> int:
    import psutil

    return next(
        one.pid for one in psutil.Process(below).children(recursive=True) if one.environ().get("RANK") == str(rank)
    )


def end(process: subprocess.Popen[str]) -> None:
    """torchrun and its ranks, which have sessions of their own and are no longer found below it once it is gone."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()


def of_ranks(rows: Rows, patience_s: float) -> None:
    for number, signum in (("19", signal.SIGKILL), ("20", signal.SIGSTOP)):
        out = rows.folder / f"rank-{number}"
        process = torchrun(out, steps=100_000, save_every=10_000)
        try:
            while len(steps_of(out)) < 3:
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            began = time.monotonic()
            os.kill(pid_of(1, process.pid), signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=patience_s)
            took_s = time.monotonic() - began
            rows.add(number, f"nothing within {patience_s:.0f} s" if process.returncode is None
                     else f"exit {process.returncode} after {took_s:.1f} s; not started again")  # fmt: skip
        finally:
            end(process)
    out = rows.folder / "ranks"
    process = torchrun(out, steps=4)
    assert process.wait(120) == 0
    shutil.rmtree(out / "final")
    ended = run(out)
    first = steps_of(out)[4]
    state = json.loads((newest(out) / "trainer_state.json").read_text())
    rows.add("31", f"2 to 1: exit {ended.code}, goes on from step {first - 1} with a global batch of "
                   f"{state['train_batch_size']} instead of 8, {ended.warned}")  # fmt: skip


def of_numbers(rows: Rows) -> None:
    out = rows.folder / "nan"
    ended = run(out, not_a_number)
    bad = sum(bool(np.isnan(one).any()) for one in weights(out).values())
    rows.add("23", f"exit {ended.code}; {bad} of {len(rows.whole)} tensors of the result are NaN")
    out = rows.folder / "few"
    ended = run(out, rows=3)
    rows.add("28", f"3 rows, batches of 4: exit {ended.code} after {len(steps_of(out))} steps")
    out = rows.folder / "none"
    ended = run(out, rows=0)
    rows.add("27", f"no rows: exit {ended.code}: {ended.last}")
    out = rows.cut("changed")
    rows.add("30", f"65 rows instead of 64: {rows.again(out, rows=65)}, {rows.ended.warned}")


TYPO = "from transformers import TrainingArguments as T; T('x', report_to=[], use_cpu=True, {})"


def of_words(rows: Rows) -> None:
    began = time.monotonic()
    wrong = subprocess.run([sys.executable, "-c", TYPO.format("learning_rat=1e-3")], capture_output=True, text=True)
    took_s = time.monotonic() - began
    text = subprocess.run([sys.executable, "-c", TYPO.format("learning_rate='abc'")], capture_output=True, text=True)
    said = "taken" if text.returncode == 0 else Ended(1, text.stderr).last
    rows.add("34", f"an unknown name: exit {wrong.returncode} after {took_s:.1f} s, {Ended(1, wrong.stderr).last}; "
                   f"learning_rate='abc': {said}")  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder))
        of_saves(rows)
        of_disks(rows)
        of_signals(rows)
        of_two(rows)
        of_numbers(rows)
        of_words(rows)
        of_ranks(rows, patience_s=60)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "torch"))
    made = (f"The last column is what a script of 40 lines around transformers' Trainer does "
            f"({datetime.now(UTC):%Y-%m-%d}, {versions}; `bench/trainer_faults.py`); where it is empty nothing "
            f"was tried.")  # fmt: skip
    TO.write_text(json.dumps({"made": made, "rows": rows.said}, indent=1) + "\n")


if __name__ == "__main__":
    if "RANK" in os.environ:
        train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    else:
        main()
