"""What objectives over labelled texts share: the labels, and the figures of an eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Example, Labelled
from dtrain.errors import DataError
from dtrain.objectives.replies import wrong_shape

_MOST = 1000
"""Labels: with more of them, they are texts of their own."""


@spec
class AbstractLabels(ObjectiveSpec):
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    labels: tuple[str, ...] = ()
    """The labels that there are; found in the data where none are named. One that is not among them is a bad row."""

    def problems(self) -> list[str]:
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            return [f"objective.labels: {', '.join(twice)} named twice; name each once"]
        if len(self.labels) == 1:
            return [f"objective.labels=[{self.labels[0]}]: one label leaves nothing to learn; name at least two"]
        return []

    def settle(self, examples: Iterable[Example]) -> Mapping[str, Any]:
        if self.labels:
            return {}
        found: set[str] = set()
        for example in examples:
            if isinstance(example, Labelled):
                found.add(example.label)
            if len(found) > _MOST:
                raise DataError(f"{example.source}: more than {_MOST:,} different labels; name those that are meant "
                                f"with objective.labels=[...], or learn them by objective=sft")  # fmt: skip
        if len(found) == 1:
            raise DataError(f"dataset: all rows have one label, {found.pop()!r}, which leaves nothing to learn; add "
                            f"rows with others")  # fmt: skip
        return {"labels": sorted(found)}

    def notes(self, shape: type[Example]) -> list[str]:
        more = f" and {len(self.labels) - 10} more" if len(self.labels) > 10 else ""
        name = type(self).__name__.lower()
        return [f"objective: {name}: {len(self.labels)} labels: {', '.join(self.labels[:10])}{more}"]

    def metrics(self, sums: Mapping[str, Sequence[float]], num_targets: int) -> Mapping[str, float]:
        return scores(self.confusion(sums)[1])

    def confusion(self, sums: Mapping[str, Sequence[float]]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
        num, counts = len(self.labels), [int(value) for value in sums["confusion"]]
        return self.labels, [counts[i * num : (i + 1) * num] for i in range(num)]

    def checked(self, example: Example) -> Labelled:
        """Raises DataError, or BadRowError for a label that is not one of these."""
        if not isinstance(example, Labelled):
            raise wrong_shape(self, example, "labelled texts", "columns `text` and `label`")
        if example.label not in self.labels:
            raise BadRowError(f"a label that is not one of objective.labels: {example.label!r}; there are: "
                              f"{', '.join(self.labels[:20])}")  # fmt: skip
        return example


def scores(counts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Accuracy, and the mean of the labels' F1: of those that occur, or were chosen. `counts`: how many of each label
    (row) were taken for each (column).
    """
    right, there = [row[i] for i, row in enumerate(counts)], [sum(row) for row in counts]
    chosen = [sum(column) for column in zip(*counts, strict=True)]
    f1 = [2 * hits / (a + b) for hits, a, b in zip(right, there, chosen, strict=True) if a + b]
    return {"accuracy": sum(right) / max(1, sum(there)), "macro_f1": sum(f1) / max(1, len(f1))}
