"""All the trackers of a run, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from dtrain.trackers.base import AbstractTracker, EvalReport, SamplesReport, StepReport


@final
class FanOut(AbstractTracker):
    """Tells every tracker; one that raises is dropped with a note to the others. May be empty."""

    def __init__(self, trackers: Iterable[AbstractTracker]) -> None:
        self._trackers = list(trackers)

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        self._tell(lambda tracker: tracker.start(steps=steps, first_step=first_step, lines=lines))

    def step(self, report: StepReport) -> None:
        self._tell(lambda tracker: tracker.step(report))

    def eval(self, report: EvalReport) -> None:
        self._tell(lambda tracker: tracker.eval(report))

    def samples(self, report: SamplesReport) -> None:
        self._tell(lambda tracker: tracker.samples(report))

    def note(self, line: str) -> None:
        self._tell(lambda tracker: tracker.note(line))

    def finish(self, *, outcome: str) -> None:
        # In reverse: the console is first by custom, and shows what the others have to say at the end.
        self._trackers.reverse()
        for tracker in list(self._trackers):
            self._tell(lambda one: one.finish(outcome=outcome), [tracker])
            if tracker in self._trackers:
                self._trackers.remove(tracker)

    def _tell(self, say: Callable[[AbstractTracker], None], trackers: Iterable[AbstractTracker] | None = None) -> None:
        heard: list[str] = []
        for tracker in list(self._trackers if trackers is None else trackers):
            try:
                say(tracker)
            except Exception as error:  # noqa: BLE001  a tracker never fails a run
                self._trackers.remove(tracker)
                name = type(tracker).__name__.lstrip("_").lower()
                heard.append(f"tracker {name} stopped: {type(error).__name__}: {error}")
            heard += tracker.warnings()
        for line in heard:
            self._tell(lambda tracker, line=line: tracker.note(line))  # type: ignore[misc]
