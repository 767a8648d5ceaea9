"""What the `datasets` library holds: a folder that it saved, a folder of data files, or a name on the hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.config.compose import nearest
from dtrain.config.spec import Span, spec
from dtrain.datasets._find import digest, inside, is_saved
from dtrain.datasets._values import listed, without_nulls
from dtrain.datasets.table import AbstractTable, Found
from dtrain.errors import DataError

_ROWS = 256
_SPANS_A_SHARD = 16
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
        if self._fetched_on_the_way:
            return [f"{self._place()}: {self._load().num_shards:,} files, read where they are and not kept"]
        return [f"{self._place()}: {self._load().num_rows:,} rows"]

    def rows(self) -> Iterator[Found]:
        return self._rows_of(self._load(), self._place())

    def spans(self) -> Sequence[Span]:
        """Rows of what the library has on disk; files of what it fetches on the way."""
        dataset = self._load()
        if self._fetched_on_the_way:
            return [Span(f"file {i + 1}", i, i + 1) for i in range(dataset.num_shards)]
        size = dataset.num_rows
        each = max(size // (_SPANS_A_SHARD * self.stream_shards), _ROWS)
        return [Span("", at, min(at + each, size)) for at in range(0, size, each)]

    def rows_in(self, span: Span) -> Iterator[Found]:
        dataset = self._load()
        if self._fetched_on_the_way:
            one = dataset.shard(num_shards=dataset.num_shards, index=span.start)
            return self._rows_of(one, f"{self._place()}, {span.name}")
        return self._rows_of(dataset.select(range(span.start, span.end or 0)), self._place(), span.start)

    def _rows_of(self, dataset: Any, place: str, number: int = 0) -> Iterator[Found]:
        """`number`: of the row before the first. Raises DataError."""
        import pyarrow as pa

        names = _label_names(dataset)
        try:
            for table in dataset.with_format("arrow").iter(batch_size=_ROWS):  # neither images nor sounds are decoded
                assert isinstance(table, pa.Table)
                for row in table.to_pylist():
                    number += 1
                    values = {name: without_nulls(value) for name, value in _named(row, names).items()}
                    yield f"{place}:row {number}", values
        except Exception as error:  # many of its own, and of the libraries below it
            raise DataError(f"{place}: {_why(error)}, after row {number:,}") from error

    def digest(self) -> str:
        """Of the content of a folder that was saved; of what the library keeps, by its place, size and time; of what it
        fetches on the way, by the versions of its files.
        """
        import xxhash

        folder = Path(self.name).expanduser()
        if is_saved(folder):
            return digest(inside(folder))
        state = xxhash.xxh3_128()
        if self._fetched_on_the_way:
            found = self._guarded(_versions, self._named_folder(), self.subset, self.revision)
            return xxhash.xxh3_128_hexdigest(found.encode())
        for file in sorted(each["filename"] for each in self._load().cache_files):
            stat = Path(file).stat()
            state.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return state.hexdigest()

    def _place(self) -> str:
        return f"{self.name}[{', '.join(filter(None, (self.subset, self.split)))}]"

    @property
    def _fetched_on_the_way(self) -> bool:
        return self.streaming and not is_saved(Path(self.name).expanduser())

    def _named_folder(self) -> str:
        folder = Path(self.name).expanduser()
        return str(folder) if folder.is_dir() else self.name

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        """Raises DataError."""
        try:
            return call(*args)
        except Exception as error:  # many of its own, and of the libraries below it
            raise DataError(f"dataset.name={self.name}: {_why(error)}") from error

    def _load(self) -> Any:
        """Raises DataError."""
        import datasets

        folder = Path(self.name).expanduser()
        if not is_saved(folder):
            return self._guarded(_loaded, self._named_folder(), self.subset, self.split, self.revision, self.streaming)
        saved = self._guarded(datasets.load_from_disk, str(folder))
        there = list(saved) if isinstance(saved, datasets.DatasetDict) else [str(saved.split or "train")]
        if self.split not in there:
            raise DataError(f"dataset.split={self.split}: no such split in {folder}{nearest(self.split, there)}; there "
                            f"are: {listed(there)}")  # fmt: skip
        return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved


@functools.lru_cache(maxsize=8)
def _loaded(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> Any:  # noqa: FBT001
    """Once in a process: each time asks the hub."""
    import datasets

    return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)


@functools.lru_cache(maxsize=8)
def _versions(name: str, subset: str | None, revision: str | None) -> str:
    """Of the files: times of those that are here, revisions of those that are not."""
    import datasets

    files = datasets.load_dataset_builder(name, subset, revision=revision).config.data_files or {}
    return json.dumps({str(split): [list(found), found.origin_metadata] for split, found in files.items()})


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
        for column, feature in (dataset.features or {}).items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    for column, there in names.items():
        number = row[column]
        if number is not None and 0 <= number < len(there):
            row[column] = there[number]
    return row
