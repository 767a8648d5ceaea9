"""Rows that a function of yours yields."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from dtrain.config import named
from dtrain.config.spec import spec
from dtrain.datasets._values import kind
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError


@spec
class Python(AbstractTable):
    function: str
    """`module:function` of a package that `plugins=[...]` allows. It yields a dictionary for each row, the same ones in
    the same order each time it is called."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What it is called with, by name."""
    version: str = ""
    """Change it when the rows change by anything else than the source file of the function: prepared data is made anew
    for another version, another source file, other `args`, and nothing else."""

    def problems(self) -> list[str]:
        return [*super().problems(), *named.problems("dataset.function", self.function, "my_package.rows:train")]

    def packages(self) -> Mapping[str, str]:
        return named.packages("dataset.function", self.function)

    def about(self) -> list[str]:
        return [f"{self.function} in {self._source()}; after a change elsewhere, type another dataset.version"]

    def rows(self) -> Iterator[Found]:
        number = 0
        try:
            for row in self._find()(**self.args):
                number += 1
                good = isinstance(row, dict)
                yield f"{self.function}:row {number}", row if good else BadRowError(f"{kind(row)} instead of a dict")
        except DataError:
            raise
        except Exception as error:  # what a user's function raises is its own affair
            frames = traceback.extract_tb(error.__traceback__)
            at = f"{frames[-1].filename}:{frames[-1].lineno}"
            raise DataError(f"dataset.function={self.function}: {type(error).__name__} after {number:,} rows: {error} "
                            f"({at})") from error  # fmt: skip

    def digest(self) -> str:
        """Of the file that the function is in."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(self._source().read_bytes())

    def _source(self) -> Path:
        """Raises DataError."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self._find()))
        except TypeError:
            file = None
        if file is None:
            raise DataError(
                f"dataset.function={self.function}: has no source file, so that changes would not be noticed"
            )
        return Path(file)

    def _find(self) -> Callable[..., Any]:
        return named.find("dataset.function", self.function, DataError)
