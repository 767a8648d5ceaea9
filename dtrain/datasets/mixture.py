"""Several datasets, mixed by weights that count tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from dtrain.config.compose import choices, clip, group_choice, nearest
from dtrain.config.spec import DatasetSpec, OnDry, Parts, spec
from dtrain.config.validate import validate_spec
from dtrain.datasets.base import AbstractRows, Example
from dtrain.errors import ConfigError, DataError

_COMMON = tuple(field.name for field in dataclasses.fields(AbstractRows))
_SHARED = ("max_length", "packing", "streaming")
"""The same for all rows of a run."""


@spec
class Mixture(AbstractRows):
    sources: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By names of your own, as {wiki: {path: a.jsonl, weight: 3}, code: {dataset: stdlib}}. Each has `weight`, its
    share of the tokens against those of the others, 1 where it is not said; `dataset`, the choice that it is, files
    where it is not said; and that choice's keys. What every dataset can be told is as for the mixture where it is not
    said."""
    on_dry: OnDry = "stop"
    """Where an epoch ends: when the first source has been seen whole (stop); when the last has, while the others start
    again (repeat); when the last has, while the others are left out (drop)."""

    def problems(self) -> list[str]:
        if not self.sources:
            return ["dataset.sources: not given; name them, as in 'dataset.sources={wiki:{path:a.jsonl,weight:3},"
                    "code:{path:b.jsonl,weight:1}}'"]  # fmt: skip
        found = [*self._made[1], *(_under(name, problem) for name, one in self._made[0].items()
                                   for problem in one.problems())]  # fmt: skip
        if self.streaming and self.on_dry != "repeat":
            found.append(f"dataset.on_dry={self.on_dry}: where a stream ends is not known before, so its sources can "
                         f"only start again; set dataset.on_dry=repeat, or dataset.streaming=false")  # fmt: skip
        return found

    def packages(self) -> Mapping[str, str]:
        return {_under(name, key): package for name, one in self._made[0].items()
                for key, package in one.packages().items()}  # fmt: skip

    def shapes(self) -> Sequence[type[Example]]:
        each = [one.shapes() for one in self.parts().datasets.values()]
        return tuple(dict.fromkeys(shape for one in each for shape in one)) if all(each) else ()

    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, one in self.parts().datasets.items() for note in _named(name, one.notes)]

    def examples(self) -> Iterator[Example]:
        """Of one source after the other."""
        for name, one in self.parts().datasets.items():
            try:
                yield from one.examples()
            except DataError as error:
                raise DataError(_under(name, str(error))) from error

    def digest(self) -> str:
        return " ".join(_named(name, one.digest) for name, one in self.parts().datasets.items())

    def parts(self) -> Parts:
        made, problems = self._made
        if problems:
            raise DataError.of(problems)
        return Parts(made, {name: float(entry.get("weight", 1)) for name, entry in self.sources.items()}, self.on_dry)

    @cached_property
    def _made(self) -> tuple[dict[str, DatasetSpec], list[str]]:
        """The sources that could be made, and what is wrong with the others."""
        made: dict[str, DatasetSpec] = {}
        problems: list[str] = []
        for name, entry in self.sources.items():
            found = self._problems_of(name, entry)
            if not found:
                try:
                    made[name] = self._make(entry)
                except ConfigError as error:
                    found = [_under(name, line) for line in str(error).splitlines()]
            problems += found
        return made, problems

    def _make(self, entry: Mapping[str, Any]) -> DatasetSpec:
        """Raises ConfigError."""
        own = {key: value for key, value in entry.items() if key not in ("dataset", "weight")}
        values = group_choice("dataset", entry.get("dataset", "files"))
        common = {key: getattr(self, key) for key in _COMMON}
        made = validate_spec("dataset", {**values, **common, **own})
        assert isinstance(made, DatasetSpec)
        return made

    def _problems_of(self, name: str, entry: Mapping[str, Any]) -> list[str]:
        path = f"dataset.sources.{clip(name)}"
        choice, weight = entry.get("dataset", "files"), entry.get("weight", 1)
        there = [one for one in choices()["dataset"] if one != "mixture"]
        found = [f"{path}.{key}: the same for all rows of a run; set dataset.{key}" for key in _SHARED if key in entry]
        if choice not in there:
            found.append(f"{path}.dataset={clip(choice)}: no such choice{nearest(str(choice), there)} "
                         f"(there are: {', '.join(there)})")  # fmt: skip
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            found.append(f"{path}.weight={clip(weight)}: not a number above 0; leave the source out to not use it")
        return found


def _under(name: str, problem: str) -> str:
    """What is said of one source, with the key that it has in the mixture."""
    return f"dataset.sources.{name}{problem.removeprefix('dataset')}" if problem.startswith("dataset") else problem


def _named(name: str, call: Any) -> Any:
    try:
        return call()
    except DataError as error:
        raise DataError(_under(name, str(error))) from error
