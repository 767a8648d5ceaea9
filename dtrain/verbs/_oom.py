"""A run for whose micro-batches memory did not suffice: it goes on with smaller ones, and comes to the same result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.config.schema import Config
    from dtrain.runs import Outcome, RunDir

PHASES = ("data", "train", "eval")
"""Of a failure that smaller micro-batches may do away with."""


def fitting(run: RunDir, settled: Config, say: Callable[[str], None]) -> Config:
    """With micro-batches of half the smallest size that memory did not suffice for in this run's attempts."""
    if settled.train.on_oom == "stop":
        return settled
    micro = settled.batch.micro_batch
    assert micro != "auto"
    attempts = run.read_manifest().get("attempts", [])
    least = min((one["micro_batch"] for one in attempts if one.get("ended") == "oom"), default=None)
    if least is None or micro <= max(1, least // 2):
        return settled
    smaller = max(1, least // 2)
    say(f"train.on_oom=smaller_micro_batch: memory did not suffice for micro-batches of {least}; it goes on with "
        f"{smaller}, and the global batch stays {settled.batch.global_batch}")  # fmt: skip
    return dataclasses.replace(settled, batch=dataclasses.replace(settled.batch, micro_batch=smaller))


def again(run: RunDir, outcome: Outcome, settled: Config, say: Callable[[str], None]) -> bool:
    """Whether to start it again with smaller micro-batches; says why not where that was asked for."""
    if outcome.kind != "oom" or settled.train.on_oom == "stop":
        return False
    failure, last = outcome.failure, run.read_manifest()["attempts"][-1]
    why_not = settled.strategy.unsavable()
    if why_not is not None:
        why_not = f"{why_not}, so that the step cannot be done again"
    elif failure is not None and failure.phase not in PHASES:
        why_not = f"memory ran out in {failure.phase}, which has no micro-batches"
    elif last["micro_batch"] == 1:
        why_not = "memory does not suffice for a micro-batch of 1"
    if why_not is not None:
        say(f"train.on_oom=smaller_micro_batch: {why_not}")
    return why_not is None
