"""Rows of Parquet and Arrow, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.datasets._values import without_nulls
from dtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256


def parquet_rows(file: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row in the row groups from `start` to before `end`. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            groups = range(opened.num_row_groups)
            before = sum(opened.metadata.row_group(i).num_rows for i in groups[:start])
            yield from _numbered(opened.iter_batches(batch_size=_ROWS, row_groups=list(groups[start:end])), before)
    except FileNotFoundError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not Parquet that can be read: {error}") from error


def num_row_groups(file: Path) -> int:
    """Of a Parquet file. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            return int(opened.num_row_groups)
    except FileNotFoundError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not Parquet that can be read: {error}") from error


def arrow_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row, of a file or a stream. Raises DataError."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as mapped:
            yield from _numbered(_batches(mapped))
    except FileNotFoundError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not Arrow that can be read: {error}") from error


def _batches(mapped: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        yield from pa.ipc.open_stream(mapped)
        return
    for i in range(reader.num_record_batches):
        yield reader.get_batch(i)


def _numbered(batches: Iterator[pa.RecordBatch], number: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """`number`: of the row before the first."""
    for batch in batches:
        for start in range(0, len(batch), _ROWS):
            for row in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"row {number}", {name: without_nulls(value) for name, value in row.items()}
