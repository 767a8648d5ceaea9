"""What holds after every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.checkpoint import manifest
from dtrain.checkpoint.verify import committed, problems
from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.harness import rows_of

EXACT = ("step", "loss", "grad_norm", "lr", "num_targets", "tokens", "samples")


def unfinished(run: RunDir) -> list[Path]:
    return sorted(run.checkpoints.glob(".tmp-*"))


def steps_of(run: RunDir) -> list[int]:
    """Of the checkpoints there are, newest first; each of them is complete."""
    folders = committed(run.checkpoints)
    wrong = [problem for folder in folders for problem in problems(folder)]
    assert wrong == []
    return [manifest.read(folder).step for folder in folders]


def assert_same_result(run: RunDir, whole: RunDir) -> None:
    """Losses, weights, moments, random states and rows are those of the run that nothing happened to, to the bit."""
    assert unfinished(run) == []
    here, there = (rows(one.path / "metrics.jsonl") for one in (run, whole))
    assert [[row[name] for name in EXACT] for row in here] == [[row[name] for name in EXACT] for row in there]
    ends = [manifest.read(committed(one.checkpoints)[0]) for one in (run, whole)]
    assert problems(committed(run.checkpoints)[0]) == []
    assert ends[0].files == ends[1].files
    assert (ends[0].progress, ends[0].counters) == (ends[1].progress, ends[1].counters)
    exported = [(one.export / "model.safetensors").read_bytes() for one in (run, whole)]
    assert exported[0] == exported[1]
    assert_rows(run, whole)


def assert_rows(run: RunDir, whole: RunDir) -> None:
    """Each attempt took, on each rank, the rows that come after its checkpoint, one step after the other."""
    expected: list[dict[int, list[int]]] = [dict(each) for each in rows_of(whole, 0)]
    for attempt in run.read_manifest()["attempts"]:
        taken = rows_of(run, attempt["attempt"])
        for rank, steps in enumerate(taken):
            places = [samples for samples, _ in steps]
            first = 4 * attempt_start(run, attempt)
            assert places == list(range(first, first + 4 * len(places), 4)), (attempt, rank)
            assert [ids for _, ids in steps] == [expected[rank][place] for place in places], (attempt, rank)


def attempt_start(run: RunDir, attempt: dict[str, Any]) -> int:
    """Of the checkpoint that the ranks took, which may be older than the one that was proposed."""
    began = [
        event for event in rows(run.events) if event["kind"] == "training" and event["attempt"] == attempt["attempt"]
    ]
    return began[0]["step"] if began else attempt["first_step"]
