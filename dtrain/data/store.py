"""Rows on disk: an Arrow file, mapped into memory, so that all ranks of a machine share its pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from dtrain.config.spec import OnDry
from dtrain.data.order import AbstractOrder, Grouped, Mixed, Shuffled, by_rate
from dtrain.data.rows import Row
from dtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_TOKENS = 2**20
"""That are in memory while they are written, at most, and not less than a row."""


class AbstractStore(ABC):
    """Rows by index, and the order in which training takes them."""

    packed: bool
    """Whether rows hold as many documents as fit; else each holds one, and they differ in length."""

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, RowStore]:
        """By name; their rows follow each other here."""

    @abstractmethod
    def row(self, i: int) -> Row:
        """Row `i`, counted from 0; copies nothing."""

    @abstractmethod
    def first(self, num: int) -> NDArray[np.int64]:
        """The rows to look at where `num` have to do."""

    @abstractmethod
    def order(self, seed: int) -> AbstractOrder:
        """Of the rows in training, those of like length beside each other where rows differ in length."""

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""

    def __len__(self) -> int:
        return sum(map(len, self.sources.values()))


class _Chunk(NamedTuple):
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    token_starts: NDArray[np.int64]
    length_starts: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    labels: NDArray[np.int32]
    label_starts: NDArray[np.int64]


@final
class RowStore(AbstractStore):
    """The rows of one file. Opening reads its table of contents only; a row is a view of the file."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is not there or not such a file."""
        import pyarrow as pa

        self.path = path
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            self._num_chunks = self._file.num_record_batches
            self._each = int(self._file.schema.metadata[b"rows_per_chunk"])
            self.packed = self._file.schema.metadata[b"packed"] == b"1"
        except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not a file of prepared rows: {error}; delete its folder and launch again"
            ) from error
        self._chunks: dict[int, _Chunk] = {}
        # All chunks but the last are full.
        last = self._num_chunks - 1
        self._num_rows = last * self._each + len(self._chunk(last).num_targets) if self._num_chunks else 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def sources(self) -> Mapping[str, RowStore]:
        return {"all": self}

    def row(self, i: int) -> Row:
        if not 0 <= i < self._num_rows:
            raise IndexError(f"row {i} of {self._num_rows} in {self.path}")
        at, k = divmod(int(i), self._each)
        chunk = self._chunk(at)
        tokens = slice(chunk.token_starts[k], chunk.token_starts[k + 1])
        lengths = slice(chunk.length_starts[k], chunk.length_starts[k + 1])
        labels = slice(chunk.label_starts[k], chunk.label_starts[k + 1])
        return Row(chunk.tokens[tokens], chunk.targets[tokens], chunk.lengths[lengths], chunk.labels[labels])

    def first(self, num: int) -> NDArray[np.int64]:
        return np.arange(min(num, self._num_rows))

    def order(self, seed: int) -> AbstractOrder:
        plain = Shuffled(seed, len(self))
        return plain if self.packed else Grouped(seed, plain, self.lengths)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        chunks = [np.diff(self._chunk(at).token_starts) for at in range(self._num_chunks)]
        return np.concatenate([np.empty(0, np.int32), *chunks], dtype=np.int32)

    @property
    def num_targets(self) -> NDArray[np.int64]:
        """Of each row."""
        chunks = [self._chunk(at).num_targets for at in range(self._num_chunks)]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def __reduce__(self) -> tuple[type[RowStore], tuple[Path]]:
        return RowStore, (self.path,)

    def _chunk(self, at: int) -> _Chunk:
        if at not in self._chunks:
            self._chunks[at] = _view(self._file.get_batch(at))
        return self._chunks[at]


@final
class MixedStore(AbstractStore):
    """The rows of several files, mixed by rates."""

    def __init__(self, sources: Mapping[str, RowStore], rates: Mapping[str, float], on_dry: OnDry) -> None:
        """`rates`: rows of each source for each of the mixture, up to a common factor."""
        self._sources, self._rates, self._on_dry = dict(sources), [rates[name] for name in sources], on_dry
        self._stores = list(sources.values())
        self._starts = np.concatenate([[0], np.cumsum([len(store) for store in self._stores])])
        self.packed = all(store.packed for store in self._stores)

    @property
    def sources(self) -> Mapping[str, RowStore]:
        return self._sources

    def row(self, i: int) -> Row:
        k = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._stores[k].row(int(i - self._starts[k]))

    def first(self, num: int) -> NDArray[np.int64]:
        return by_rate([len(store) for store in self._stores], self._rates)[:num]

    def order(self, seed: int) -> AbstractOrder:
        mixed = Mixed(seed, [len(store) for store in self._stores], self._rates, self._on_dry)
        return mixed if self.packed else Grouped(seed, mixed, self.lengths)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return np.concatenate([store.lengths for store in self._stores])


def write_rows(path: Path, rows: Iterable[Row], *, max_length: int = 1024, packed: bool = True) -> int:
    """Write a file that `RowStore` opens, flushed to disk; returns the number of rows."""
    import os

    import pyarrow as pa

    each = max(1, _CHUNK_TOKENS // max_length)
    schema = pa.schema(
        [
            ("tokens", pa.large_list(pa.int32())),
            ("targets", pa.large_list(pa.uint8())),  # not bool: Arrow packs those into bits, and a view would not do
            ("lengths", pa.large_list(pa.int32())),
            ("num_targets", pa.int64()),
            ("labels", pa.large_list(pa.int32())),
        ],
        metadata={"packed": str(int(packed)), "rows_per_chunk": str(each)},
    )
    written = 0
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as out:
            for chunk in _chunked(rows, each):
                written += len(chunk)
                columns = [
                    _lists([row.tokens for row in chunk], pa.int32()),
                    _lists([row.targets.view(np.uint8) for row in chunk], pa.uint8()),
                    _lists([row.lengths for row in chunk], pa.int32()),
                    pa.array([row.num_targets for row in chunk], pa.int64()),
                    _lists([row.labels for row in chunk], pa.int32()),
                ]
                out.write_batch(pa.record_batch(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    return written


def _lists(arrays: list[NDArray[np.generic]], kind: pa.DataType) -> pa.LargeListArray:
    import pyarrow as pa

    starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(np.concatenate(arrays), kind))


def _view(batch: pa.RecordBatch) -> _Chunk:
    tokens, targets, lengths, num_targets, labels = batch.columns
    return _Chunk(
        tokens.values.to_numpy(),
        targets.values.to_numpy().view(np.bool_),
        lengths.values.to_numpy(),
        tokens.offsets.to_numpy(),
        lengths.offsets.to_numpy(),
        num_targets.to_numpy(),
        labels.values.to_numpy(),
        labels.offsets.to_numpy(),
    )


def _chunked(rows: Iterable[Row], num: int) -> Iterator[list[Row]]:
    left = iter(rows)
    while chunk := list(islice(left, num)):
        yield chunk
