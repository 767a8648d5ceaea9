"""`make soak`: runs live through accidents that are drawn at random, each attempt under another strategy and on other
ranks; each is to end as the run of one process that nothing happened to.

What tests show of one fault at one moment, this looks for at any moment and in any order. It finds what nobody has thought
of, so it is not part of the tests: `SECONDS=600 SEED=... TYPED='tuning=lora ...'`; the seed draws the same lives, though
not the same moments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dtrain.runs import RunDir
from tests.cluster.machines import Machines
from tests.e2e.command import SMALL, workers_of
from tests.e2e.command import rows as read
from tests.faults.expect import unfinished
from tests.faults.harness import rows_of

STEPS = 120
TYPED = [*SMALL, "dataset.path=texts.jsonl", "dataset.on_long=split", f"train.steps={STEPS}", "eval.every_steps=10",
         "eval.fraction=0.05", "optim.lr=1e-3", "tracker=jsonl", "tracker.jsonl.plot=false", "run.hang_after=60"]  # fmt: skip
SLOWLY = "train.forward:sleep=0.02"
WHERE = ("at.eval:sleep=0.1", "at.save:sleep=0.1", "ckpt.stage:sleep=0.1", "ckpt.tensors:sleep=0.1", "ckpt.mid:sleep=0.002",
         "ckpt.manifest:sleep=0.1", "ckpt.rename:sleep=0.1", "ckpt.committed:sleep=0.1", "ckpt.pointed:sleep=0.1",
         "discard:sleep=0.1")  # fmt: skip
"""One of these places takes longer than it would; in the middle of a file there are many."""
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CLOSE = 1e-3
"""Of losses: sums in another order come apart a little more with each step; other rows would be a hundred times that."""
LONG_S = 120.0
"""No attempt takes as long, after its accident or without one."""
LEFT_S = 20.0
"""By then the ranks of a launcher that was killed have saved and ended."""
GENTLE = {0, 75, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1}
"""Exit codes of one that was told to end; the signals: before Python had a handler for them."""
KILLED = {0, 3, 75, -signal.SIGKILL}


@dataclasses.dataclass(frozen=True)
class Scene:
    """An attempt under way."""

    run: RunDir
    launchers: list[subprocess.Popen[str]]
    draw: random.Random

    def launcher(self) -> list[int]:
        return [self.draw.choice([one.pid for one in self.launchers])]

    def rank(self) -> list[int]:
        return [self.draw.choice(found)] if (found := workers_of(self.run.path)) else []

    def all(self) -> list[int]:
        return [one.pid for one in self.launchers] + workers_of(self.run.path)


@dataclasses.dataclass(frozen=True)
class Accident:
    do: Callable[[Scene], None]
    codes: set[int] = dataclasses.field(default_factory=lambda: {0})
    """Exit codes that it may lead to."""


def _send(
    whom: Callable[[Scene], list[int]], *signals: signal.Signals, between_s: float = 0.0
) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        chosen = whom(scene)
        for number, signum in enumerate(signals):
            time.sleep(between_s * bool(number))
            for pid in chosen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    return do


def _touch(name: str) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        if scene.run.path.is_dir():
            (scene.run.path / name).touch()

    return do


PAUSE = (signal.SIGSTOP, signal.SIGCONT)
ACCIDENTS = {
    "none": Accident(lambda scene: None),
    "SIGKILL to a rank": Accident(_send(Scene.rank, signal.SIGKILL), KILLED),
    "SIGKILL to a launcher": Accident(_send(Scene.launcher, signal.SIGKILL), KILLED),
    "SIGKILL to all": Accident(_send(Scene.all, signal.SIGKILL), KILLED),
    "SIGTERM to a rank": Accident(_send(Scene.rank, signal.SIGTERM), {*GENTLE, 3}),
    "SIGUSR1 to a rank": Accident(_send(Scene.rank, signal.SIGUSR1), {*GENTLE, 3}),
    "SIGTERM to a launcher": Accident(_send(Scene.launcher, signal.SIGTERM), GENTLE),
    "SIGUSR1 to a launcher": Accident(_send(Scene.launcher, signal.SIGUSR1), GENTLE),
    "SIGINT to a launcher": Accident(_send(Scene.launcher, signal.SIGINT), {*GENTLE, 130}),
    "SIGTERM twice": Accident(_send(Scene.launcher, signal.SIGTERM, signal.SIGTERM, between_s=0.3), {*GENTLE, 3}),
    "STOP": Accident(_touch("STOP"), GENTLE),
    "SAVE": Accident(_touch("SAVE")),
    "a rank frozen for 2 s": Accident(_send(Scene.rank, *PAUSE, between_s=2)),
    "a launcher frozen for 2 s": Accident(_send(Scene.launcher, *PAUSE, between_s=2)),
    "all frozen for 3 s": Accident(_send(Scene.all, *PAUSE, between_s=3)),
    "a byte of the newest checkpoint": Accident(lambda scene: _flip(scene.run, scene.draw), KILLED),
}


def _flip(run: RunDir, draw: random.Random) -> None:
    """A bit of it, once all have ended."""
    _send(Scene.all, signal.SIGKILL)(Scene(run, [], draw))
    if there := sorted(run.checkpoints.glob("step-*/rank-*.safetensors")):
        content = bytearray(there[-1].read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        there[-1].write_bytes(content)


class Soak:
    """Lives one after the other, in a folder of their own."""

    def __init__(self, folder: Path, seed: int, typed: Sequence[str] = ()) -> None:
        self._typed = [*TYPED, *typed]
        self._machines, self._draw = Machines(folder, num_texts=1200), random.Random(seed)
        self._whole = self._run("whole")
        whole = self._machines.start(*self._typed, "run.name=whole", "strategy=ddp", "launcher.procs=1")
        assert whole.wait(300) == 0, self._machines.said(0)
        self._steps = {row["step"]: row for row in read(self._whole.metrics)}
        self._rows = dict(rows_of(self._whole, 0)[0])
        self.met, self.wrong = Counter[str](), list[str]()

    def _run(self, name: str) -> RunDir:
        return RunDir(self._machines.folder / "runs" / name)

    def live(self, number: int) -> int:
        """One run, until it is done; returns how many attempts that took."""
        run, attempts = self._run(f"life-{number}"), 0
        while True:
            what = self._draw.choice(list(ACCIDENTS)) if attempts < 12 else "none"
            how, nodes = self._how()
            began, slow = len(self._machines.started), f"{SLOWLY},{self._draw.choice(WHERE)}"
            scene = Scene(run, [self._machines.start(*self._typed, *how, f"run.name={run.name}", DTRAIN_FAIL=slow)
                                for _ in range(nodes)], self._draw)  # fmt: skip
            attempts += 1
            self._wait(scene)
            codes = self._meet(scene, what)
            said = "".join(map(self._machines.said, range(began, began + nodes)))
            wrong = [*_unexpected(codes, what, said), *self._left(run), *self._result(run, done=set(codes) == {0})]
            print(f"{run.name}.{attempts}: {' '.join(how)}: {what}: {codes}", *wrong, sep="\n  WRONG: ", flush=True)
            self.wrong += [f"{run.name}.{attempts}: {what}: {one}\n{said}" for one in wrong]
            if set(codes) == {0} or wrong:
                return attempts

    def _how(self) -> tuple[list[str], int]:
        """What is typed, and on how many machines."""
        draw, nodes = self._draw, 1 + (self._draw.random() < 0.35)
        typed = [f"strategy={draw.choice(STRATEGIES)}", f"launcher.procs={draw.randint(1, 4 - nodes)}",
                 f"batch.micro_batch={draw.choice([1, 2, 4, 8])}", f"checkpoint.async={draw.choice(['true', 'false'])}",
                 f"checkpoint.every_steps={draw.choice([1, 3, 7])}"]  # fmt: skip
        if nodes > 1:
            typed += ["launcher=torchrun", f"launcher.nodes={nodes}", "launcher.join_timeout_s=30"]
        return typed, nodes

    def _wait(self, scene: Scene) -> None:
        """For the moment: some steps after it trains, or any time after the start."""
        draw, deadline = self._draw, time.monotonic() + LONG_S
        steps = None if draw.random() < 0.25 else _trained(scene.run) + draw.randint(1, STEPS // 3)
        at = time.monotonic() + draw.uniform(0, 10)
        while all(one.poll() is None for one in scene.launchers) and time.monotonic() < deadline:
            if time.monotonic() > at if steps is None else _trained(scene.run) >= steps:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))

    def _meet(self, scene: Scene, what: str) -> list[int | None]:
        """The exit codes; None of one that did not end."""
        if any(one.poll() is None for one in scene.launchers):
            self.met[what] += 1
            ACCIDENTS[what].do(scene)
        deadline = time.monotonic() + LONG_S
        while any(one.poll() is None for one in scene.launchers) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [one.poll() for one in scene.launchers]
        if None in codes:
            _send(Scene.all, signal.SIGKILL)(scene)
        return codes

    def _left(self, run: RunDir) -> list[str]:
        deadline = time.monotonic() + LEFT_S
        while workers_of(run.path) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"processes are left: {left}"] if (left := workers_of(run.path)) else []

    def _result(self, run: RunDir, *, done: bool) -> list[str]:
        """What differs from the run that nothing happened to."""
        got = {row["step"]: row for row in read(run.metrics)} if run.metrics.exists() else {}
        wrong = [f"step {step}: {key} {row[key]}, not {self._steps[step][key]}" for step, row in got.items()
                 for key in ("samples", "tokens", "lr", "loss")
                 if abs(row[key] - self._steps[step][key]) > (CLOSE if key == "loss" else 0)][:1]  # fmt: skip
        attempts = run.read_manifest().get("attempts", []) if run.path.is_dir() else []
        for one in attempts:
            taken = rows_of(run, one["attempt"])
            if len(taken) == one["size"]:  # else some had not begun; one that was killed may be a step behind
                wrong += [f"attempt {one['attempt']}: other rows after {ranks[0][0]} samples"
                          for ranks in zip(*taken, strict=False)
                          if [row for _, ids in ranks for row in ids] != self._rows[ranks[0][0]]][:1]  # fmt: skip
        if done:
            wrong += ["not every step is there"] * (sorted(got) != list(range(1, STEPS + 1)))
            wrong += [f"unfinished: {left}"] if (left := unfinished(run)) else []
        return wrong


def _unexpected(codes: list[int | None], what: str, said: str) -> list[str]:
    # One that comes after the other was told to end has not heard of that, and waits for it.
    expected = ACCIDENTS[what].codes | ({3} if "only 1 came within" in said else set())
    return [f"exit codes {codes}"] if not expected.issuperset(codes) else []


def _trained(run: RunDir) -> int:
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs that live through accidents, drawn at random.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("typed", nargs="*", help="what else all runs are launched with")
    args = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="dtrain-soak-")), time.monotonic()
    print(f"seed {args.seed}, in {folder}", flush=True)
    soak, lives, attempts = Soak(folder, args.seed, args.typed), 0, 0
    while time.monotonic() - began < args.seconds:
        lives += 1
        attempts += soak.live(lives)
    print(*(f"{number:4} {what}" for what, number in sorted(soak.met.items())), *soak.wrong, sep="\n")
    print(
        f"seed {args.seed}: {lives} lives in {attempts} attempts, {sum(soak.met.values())} accidents, {len(soak.wrong)} wrong"
    )
    if not soak.wrong:  # else for whoever looks for the cause
        shutil.rmtree(folder)
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
