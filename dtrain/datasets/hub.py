"""What the `datasets` library holds: a folder that it saved, a folder of data files, or a name on the hub."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.config.compose import nearest
from dtrain.config.spec import spec
from dtrain.datasets._find import digest, inside, is_saved
from dtrain.datasets._values import listed, without_nulls
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError

_ROWS = 256
_OFFLINE = {"OfflineModeIsEnabled", "ConnectError", "ProxyError"}
"""Errors of the libraries below that mean the same as a ConnectionError."""


@spec
class Hub(AbstractTable):
    name: str
    """A folder, or a name on the hub such as `tatsu-lab/alpaca`. No code of a dataset is run."""
    subset: str | None = None
    """Where the dataset has several."""
    split: str = "train"
    """As the library writes it: train, or train[:10%]."""
    revision: str | None = None
    """A commit, tag or branch on the hub; its newest when not given."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.name in ("???", ""):
            found.append("dataset.name: not given; name a folder, or a dataset on the hub, as in "
                         "dataset.name=tatsu-lab/alpaca")  # fmt: skip
        elif self.name.startswith(("/", "~", ".")) and not Path(self.name).expanduser().is_dir():
            found.append(f"dataset.name={self.name}: no such folder")
        return found

    def about(self) -> list[str]:
        return [f"{self._place()}: {self._load().num_rows:,} rows"]

    def rows(self) -> Iterator[Found]:
        import pyarrow as pa

        dataset, number = self._load(), 0
        names = _label_names(dataset)
        for table in dataset.with_format("arrow").iter(batch_size=_ROWS):  # neither images nor sounds are decoded
            assert isinstance(table, pa.Table)
            for row in table.to_pylist():
                number += 1
                values = {name: without_nulls(value) for name, value in _named(row, names).items()}
                yield f"{self._place()}:row {number}", values

    def digest(self) -> str:
        """Of the content of a folder that was saved; of what the library keeps, by its place, size and time."""
        import xxhash

        folder = Path(self.name).expanduser()
        if is_saved(folder):
            return digest(inside(folder))
        state = xxhash.xxh3_128()
        for file in sorted(each["filename"] for each in self._load().cache_files):
            stat = Path(file).stat()
            state.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return state.hexdigest()

    def _place(self) -> str:
        return f"{self.name}[{', '.join(filter(None, (self.subset, self.split)))}]"

    def _load(self) -> Any:
        """Raises DataError."""
        import datasets

        folder = Path(self.name).expanduser()
        try:
            if not is_saved(folder):
                name = str(folder) if folder.is_dir() else self.name
                return _loaded(name, self.subset, self.split, self.revision)
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # many of its own, and of the libraries below it
            raise DataError(f"dataset.name={self.name}: {_why(error)}") from error
        there = list(saved) if isinstance(saved, datasets.DatasetDict) else [str(saved.split or "train")]
        if self.split not in there:
            raise DataError(f"dataset.split={self.split}: no such split in {folder}{nearest(self.split, there)}; there "
                            f"are: {listed(there)}")  # fmt: skip
        return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved


@functools.lru_cache(maxsize=8)
def _loaded(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """Once in a process: each time asks the hub."""
    import datasets

    return datasets.load_dataset(name, subset, split=split, revision=revision)


def _why(error: Exception) -> str:
    import datasets

    said = " ".join(str(error).split())
    said = said if len(said) <= 300 else f"{said[:297]}..."
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"neither a folder here nor a dataset on the hub: {said}"
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _OFFLINE:
        return (f"the hub cannot be reached, and it is not in the cache here: {said}; where there is a network, save "
                f"it by save_to_disk(FOLDER), then type dataset.name=FOLDER")  # fmt: skip
    return f"{type(error).__name__}: {said}"


def _label_names(dataset: Any) -> dict[str, list[str]]:
    """Of columns in which labels are numbers."""
    import datasets

    return {
        column: feature.names
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    for column, there in names.items():
        number = row[column]
        if number is not None and 0 <= number < len(there):
            row[column] = there[number]
    return row
