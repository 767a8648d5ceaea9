"""Rows that a function of yours yields."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from dtrain.config.spec import spec
from dtrain.datasets._values import kind
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


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
        found = super().problems()
        if self.function == "???":
            found.append("dataset.function: not given; name yours, as in dataset.function=my_package.rows:train")
        elif not _NAME.fullmatch(self.function):
            found.append(f"dataset.function={self.function}: not module:function, as in my_package.rows:train")
        return found

    def packages(self) -> Mapping[str, str]:
        package = self.function.partition(".")[0].partition(":")[0]
        return {f"dataset.function={self.function}": package} if _NAME.fullmatch(self.function) else {}

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
        """Raises DataError."""
        module, _, name = self.function.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # what a user's module raises at import is its own affair
            raise DataError(f"dataset.function={self.function}: {type(error).__name__} while {module} was imported: "
                            f"{error}") from error  # fmt: skip
        if not callable(found):
            raise DataError(f"dataset.function={self.function}: {module} has no function {name}")
        return found
