"""kill -9 of all ranks, wherever they are: the same command goes on, and the end is the same to the bit."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.expect import assert_rows, assert_same_result, steps_of, unfinished
from tests.faults.harness import Fault, launch

pytestmark = pytest.mark.slow

STEPS, MANY = 8, 60
KILLS = 50 if os.environ.get("DTRAIN_FAULTS") == "all" else 30


@pytest.mark.parametrize(
    ("fail", "there", "left"),
    [
        # Where; the number of checkpoints at that moment, with one kept besides the newest; unfinished folders.
        ("ckpt.stage:kill:after=1", 1, 0),
        ("ckpt.tensors:kill:after=2", 2, 1),
        ("ckpt.mid:kill:rank=1:after=6", 1, 1),  # the second of five pieces of its second file
        ("ckpt.manifest:kill", 0, 1),
        ("ckpt.manifest:kill:after=2", 2, 1),
        ("ckpt.rename:kill:after=2", 2, 1),
        ("ckpt.committed:kill:after=1", 2, 0),
        ("ckpt.pointed:kill:after=2", 3, 0),
        ("discard:kill", 2, 1),
    ],
)
def test_killed_at_a_phase_of_a_save(
    folder: Path, whole: Callable[[int], RunDir], fail: str, there: int, left: int
) -> None:
    name = f"phase-{fail.replace(':', '-')}"
    run = RunDir(folder / "runs" / name)
    # In the foreground every step is saved, however fast the disk is; in the background a file has always five pieces.
    typed = [f"train.steps={STEPS}", f"checkpoint.async={str('ckpt.mid' in fail).lower()}"]
    ended = launch(folder, name, *typed, fault=Fault(fail=fail))
    assert ended.code == 3, ended.said
    steps = steps_of(run)
    assert (len(steps), len(unfinished(run))) == (there, left)
    if fail.startswith("ckpt.committed"):  # the new one counts, whatever the pointer says
        assert (run.checkpoints / "latest").read_text().split() == [f"step-{steps[1]:08d}"]
    again = launch(folder, name, f"train.steps={STEPS}")
    assert again.code == 0, again.said
    assert run.read_manifest()["attempts"][1]["first_step"] == (steps[0] if steps else 0)
    assert again.out.count("which a killed save left") == left
    assert_same_result(run, whole(STEPS))


def test_killed_at_random_moments(folder: Path, whole: Callable[[int], RunDir]) -> None:
    """Most kills are while it trains, a few while it joins, loads or ends."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw, kills, lives, in_saves, steps = random.Random(seed), 0, 0, 0, [0]
    while kills < KILLS:
        lives, newest = lives + 1, 0
        run = RunDir(folder / "runs" / f"random-{lives}")
        while True:
            moment = _moment(draw) if kills < KILLS else Fault()
            before = unfinished(run)
            ended = launch(folder, run.name, f"train.steps={MANY}", fault=moment)
            assert not [path for path in before if path.exists()], f"seed {seed}, kill {kills}"
            assert run.read_manifest()["attempts"][-1]["first_step"] == newest, f"seed {seed}, kill {kills}"
            if ended.code == 0:  # it was done before its moment came
                break
            kills, in_saves = kills + 1, in_saves + bool(unfinished(run))
            there = steps_of(run)
            assert there or not newest, f"seed {seed}, kill {kills}: the checkpoints are gone"
            newest = there[0] if there else 0
            steps.append(newest)
            assert_rows(run, whole(MANY))
        assert_same_result(run, whole(MANY))
    print(f"{kills} kills in {lives} runs, {in_saves} of them in the middle of a save; newest checkpoints {steps}")
    assert in_saves > 0


def _moment(draw: random.Random) -> Fault:
    """A while after some steps have begun, or after the start."""
    steps, delay_s = draw.randint(1, 8), draw.uniform(0, 0.05)
    if draw.random() < 0.15:
        steps, delay_s = 0, draw.uniform(0, 1)
    due: list[float] = []

    def kill(run: RunDir, attempt: int) -> bool:
        if not due and (not steps or len(_lines(run.attempt_dir(attempt) / "rank-0.rows.jsonl")) >= steps):
            due.append(time.monotonic() + delay_s)
        return bool(due) and time.monotonic() > due[0]

    return Fault(kill=kill, fail="ckpt.mid:sleep=0.01")  # so that most moments are within a save


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_what_a_failing_rank_leaves_to_the_others(folder: Path, whole: Callable[[int], RunDir]) -> None:
    """A rank that is gone in the middle of a save ends it for all, at once and without a checkpoint of it."""
    run = RunDir(folder / "runs" / "one-gone")
    began = time.monotonic()
    ended = launch(
        folder, run.name, f"train.steps={STEPS}", fault=Fault(fail="ckpt.mid:kill:rank=1:after=6", others_s=200)
    )
    assert ended.code == 3, ended.said
    assert time.monotonic() - began < 100, "rank 0 waited for the one that is gone"
    assert len(steps_of(run)) == 1
    assert [event["kind"] for event in rows(run.events)].count("saved") == 1
    assert launch(folder, run.name, f"train.steps={STEPS}").code == 0
    assert_same_result(run, whole(STEPS))
