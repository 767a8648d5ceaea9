from __future__ import annotations

from typing import Any

from dtrain.trackers.base import EvalReport, Sample, SamplesReport, StepReport


def step_report(step: int, **changed: Any) -> StepReport:
    fields: dict[str, Any] = {
        "step": step, "loss": 2.5, "grad_norm": 1.25, "lr": 3e-4, "num_targets": 900, "tokens": 1000,
        "tokens_per_s": 51234.0, "step_s": 0.02, "data_s": 0.001, "mfu": None, "mem_bytes": 3 * 2**30, "epoch": 0.5,
        "samples": 8 * step,
    }  # fmt: skip
    return StepReport(**{**fields, **changed})


def eval_report(step: int, **changed: Any) -> EvalReport:
    return EvalReport(**{"step": step, "loss": 2.25, "num_targets": 90, "eval_s": 1.0, **changed})


def samples_report(step: int) -> SamplesReport:
    return SamplesReport(step, [Sample("a\n", "b\x1b[2J", "stop", 1), Sample("c" * 80, "d", "length", 9)], 0.5)
