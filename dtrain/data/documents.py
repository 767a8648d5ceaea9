"""Documents on their way from the tokenizer to the rows: on disk, so that memory does not grow with them."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from dtrain.data.rows import Row

if TYPE_CHECKING:
    from types import TracebackType

Ints = NDArray[np.int64]
_NO_LABELS = np.empty(0, np.int32)


def coded(row: Row) -> NDArray[np.int32]:
    """Each token in one number with what it is: four times the token, and 2 more where a document begins, 1 for a
    target.
    """
    codes = row.tokens * 4 + row.targets
    codes[np.cumsum(row.lengths) - row.lengths] += 2
    return codes


def decoded(codes: NDArray[np.int32], labels: NDArray[np.int32]) -> Row:
    """The row of `coded` documents, one after the other."""
    edges = np.append(np.flatnonzero(codes & 2), len(codes))
    return Row(codes >> 2, (codes & 1).astype(np.bool_), np.diff(edges).astype(np.int32), labels)


@final
class Documents:
    """A file to which documents are added, and from which rows are put together. Keeps 13 bytes a document in memory,
    and 4 for a label. What an objective made of one example stays together, as one document here.

    Read by calls rather than mapped: pages that are mapped count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._lengths, self._shares, self._labels = array("i"), array("d"), array("i")

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """The file goes."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._lengths)

    def add(
        self,
        codes: NDArray[np.int32],
        lengths: NDArray[np.int32],
        shares: NDArray[np.float64],
        labels: NDArray[np.int32] = _NO_LABELS,
    ) -> None:
        """`codes` of several documents, one after the other; `shares` are what `hold_out` decides by; `labels` of each,
        or none.
        """
        self._file.write(codes.data)
        self._lengths.frombytes(lengths.tobytes())
        self._shares.frombytes(shares.tobytes())
        self._labels.frombytes(labels.tobytes())

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each; nothing may be added while this is in use."""
        return np.frombuffer(self._lengths, np.int32)

    @property
    def shares(self) -> NDArray[np.float64]:
        return np.frombuffer(self._shares, np.float64)

    def flush(self) -> None:
        """After the last is added."""
        self._file.flush()

    def row(self, which: Ints, starts: Ints) -> Row:
        """These documents, of which each starts after so many tokens, one after the other."""
        lengths = self.lengths[which]
        handle = self._file.fileno()
        parts = [os.pread(handle, 4 * length, 4 * start)
                 for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]  # fmt: skip
        codes = np.frombuffer(b"".join(parts), np.int32)
        assert len(codes) == lengths.sum(), (self._path, starts, lengths, len(codes))
        return decoded(codes, np.frombuffer(self._labels, np.int32)[which] if self._labels else _NO_LABELS)
