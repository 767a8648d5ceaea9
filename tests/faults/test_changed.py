"""Gone on with under another configuration: what decides the result is refused, what does not just works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.expect import steps_of
from tests.faults.harness import Fault, launch, rows_of

pytestmark = pytest.mark.slow

STEPS, CUT = 8, 2
LENGTH = [f"train.steps={STEPS}", "checkpoint.async=false"]
KILLED = Fault(fail=f"ckpt.stage:kill:after={CUT}")
"""In its third step, when two are saved."""


@pytest.fixture(scope="module")
def cut(folder: Path) -> RunDir:
    """A run that was killed."""
    ended = launch(folder, "changed", *LENGTH, fault=KILLED)
    assert ended.code == 3, ended.said
    run = RunDir(folder / "runs" / "changed")
    assert steps_of(run)[0] == CUT
    return run


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["optim.lr=1e-3"], ["optim.lr: was 0.005, is 0.001"]),
        (["optim.betas=[0.9,0.99]"], ["optim.betas: was [0.9, 0.95], is [0.9, 0.99]"]),
        (["run.seed=7"], ["run.seed: was 0, is 7", "data: was "]),
        (["model.hidden=48"], ["model.hidden_size: was 32, is 48"]),
        (["model.vocab=280"], ["model.vocab_size: was 300, is 280", "tokenizer: was ", "data: was "]),
        (["batch.global_batch=6"], ["batch.global_batch: was 4, is 6"]),
        (["train.precision=bf16"], ["train.precision: was fp32, is bf16"]),
        (["schedule=linear"], ["schedule: was dtrain.schedules.cosine.Cosine, is dtrain.schedules.linear.Linear"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_what_decides_the_result_is_refused(folder: Path, cut: RunDir, typed: list[str], told: list[str]) -> None:
    before = cut.read_manifest()
    ended = launch(folder, cut.name, *LENGTH, *typed)
    assert ended.code == 2, ended.said
    for line in told:
        assert f"\n  {line}" in ended.err
    keys = [line.split(":")[0] for line in told]
    asked = ended.err.split("resume.allow=[")[1].split("]")[0].split(",")
    assert set(keys) <= set(asked)
    assert cut.read_manifest() == before, "nothing was started"


def test_with_leave_another_rate_is_taken_and_a_larger_model_is_not(folder: Path, cut: RunDir) -> None:
    ended = launch(folder, "larger", f"resume={cut.path}", "model.hidden=48", "resume.allow=[model]", *LENGTH)
    assert ended.code == 2, ended.said
    assert "not of this model" in ended.said
    assert "of shape (300, 32) in the checkpoint, (300, 48) here" in ended.said
    ended = launch(folder, "slower", f"resume={cut.path}", "optim.lr=1e-3", "resume.allow=[optim.lr]", *LENGTH)
    assert ended.code == 0, ended.said
    assert "resume: allowed: optim.lr: was 0.005, is 0.001" in ended.out
    run = RunDir(folder / "runs" / "slower")
    assert run.read_manifest()["attempts"][0]["differences"] == ["optim.lr: was 0.005, is 0.001"]
    first = rows(run.path / "metrics.jsonl")[0]
    assert (first["step"], first["lr"]) == (CUT + 1, pytest.approx(1e-3))  # two steps were warm-up


WAY = [("ddp", 2), ("zero2", 1), ("zero3", 3), ("fsdp2", 4)]


def test_other_strategies_and_numbers_of_ranks_just_work(folder: Path, whole: Callable[[int], RunDir]) -> None:
    run, through = RunDir(folder / "runs" / "way"), whole(STEPS)
    for i, (strategy, size) in enumerate(WAY, 1):
        ended = launch(folder, run.name, *LENGTH, f"strategy={strategy}", f"launcher.procs={size}",
                       fault=KILLED if i < len(WAY) else Fault())  # fmt: skip
        assert ended.code == (3 if i < len(WAY) else 0), ended.said
        assert steps_of(run)[0] == CUT * i
    attempts = run.read_manifest()["attempts"]
    assert [(one["strategy"], one["size"], one["first_step"]) for one in attempts] == [
        (strategy, size, CUT * i) for i, (strategy, size) in enumerate(WAY)
    ]
    here, there = (rows(one.path / "metrics.jsonl") for one in (run, through))
    assert [row["step"] for row in here] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in here] == pytest.approx([row[name] for row in there], rel=1e-6)
    expected = _rows(through, 0)
    for i in range(len(WAY)):  # the step in which an attempt was killed is made again
        taken = _rows(run, i)
        assert list(taken) == [4 * step for step in range(CUT * i, min(CUT * i + 3, STEPS))]
        assert taken == {place: expected[place] for place in taken}


def _rows(run: RunDir, attempt: int) -> dict[int, list[int]]:
    """What all ranks together took, by the number of samples before."""
    taken: dict[int, list[int]] = {}
    for rank in rows_of(run, attempt):
        for samples, ids in rank:
            taken.setdefault(samples, []).extend(ids)
    return taken
