from __future__ import annotations

from typing import final

from dtrain.trackers.base import AbstractTracker, EvalReport, StepReport
from dtrain.trackers.fan_out import FanOut
from tests.unit.trackers.reports import step_report


@final
class _Fake(AbstractTracker):
    def __init__(self, *, fails_at: int = -1) -> None:
        self.heard: list[str] = []
        self.to_say: list[str] = []
        self.fails_at = fails_at

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        self.heard.append("start")

    def step(self, report: StepReport) -> None:
        if report.step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.heard.append(f"step {report.step}")

    def eval(self, report: EvalReport) -> None:
        self.heard.append("eval")

    def note(self, line: str) -> None:
        self.heard.append(line)

    def finish(self, *, outcome: str) -> None:
        self.heard.append(outcome)

    def warnings(self) -> list[str]:
        said, self.to_say = self.to_say, []
        return said


def test_one_that_fails_is_dropped_and_the_others_hear_of_it() -> None:
    good, bad = _Fake(), _Fake(fails_at=2)
    all_of_them = FanOut([good, bad])
    all_of_them.start(steps=3, first_step=0, lines=[])
    for step in (1, 2, 3):
        all_of_them.step(step_report(step))
    all_of_them.finish(outcome="done")
    full = "[Errno 28] No space left on device"
    assert bad.heard == ["start", "step 1"]
    assert good.heard == ["start", "step 1", "step 2", f"tracker fake stopped: OSError: {full}", "step 3", "done"]


def test_a_warning_reaches_the_others_also_at_the_end() -> None:
    console, wandb = _Fake(), _Fake()
    all_of_them = FanOut([console, wandb])
    wandb.to_say.append("no key")
    all_of_them.step(step_report(1))
    wandb.to_say.append("not sent")
    all_of_them.finish(outcome="done")
    assert console.heard == ["step 1", "no key", "not sent", "done"]


def test_may_be_empty() -> None:
    FanOut([]).finish(outcome="done")
