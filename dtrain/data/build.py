"""The rows of one dataset, from its examples to files: encoded on all cores, packed, written. Without torch.

Memory does not grow with the data but for some bytes of each document: the documents wait on disk, and packing looks at
their lengths.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.config.spec import DatasetSpec, ObjectiveSpec, OnLong
from dtrain.data.counts import Counts
from dtrain.data.documents import Documents
from dtrain.data.encode import Encoder, Limit, encode_all
from dtrain.data.pack import fewest_rows, one_each, pack
from dtrain.data.prepared import FILES, META
from dtrain.data.rows import Row
from dtrain.data.store import write_rows
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRows
from dtrain.datasets.base import Chat, Example, Judged, Preference, Skipped, Text
from dtrain.errors import DataError

WINDOW = 2**20
"""Documents that are packed together: so many that no more would make the rows fuller, and so few that what goes into a
row is near each other on disk."""


def build(
    folder: Path,
    dataset: DatasetSpec,
    objective: ObjectiveSpec,
    assets: Path,
    about: Callable[..., list[str]],
    parts: Mapping[str, Any],
    tell: Callable[[str], None],
) -> None:
    """Fill `folder` with `FILES` and `META`. `assets` has the tokenizer, `about` tells of its template; `parts`: all
    that the rows depend on; `tell` hears how far it is. Raises DataError.
    """
    shape, examples = peek(dataset.examples())
    resolved, settled = settled_by(objective.resolve(shape), dataset.examples())
    encoder = encoder_of(dataset, resolved, shape, assets, parts["run.seed"])
    tokenizer = encoder.load()
    with Documents(folder / "documents") as documents:
        counts = encode_all(
            examples, encoder, tokenizer, documents, bad=BadRows.of(dataset), tell=tell, size=dataset.size()
        )
        if not len(documents):
            raise nothing_left(counts)
        held = hold_out(documents.shares, parts["eval.fraction"])
        writer = _Writer(documents, dataset.max_length, packing=dataset.packing, tell=tell)
        num_rows = [writer.write(folder / name, chosen) for name, chosen in zip(FILES, (~held, held), strict=True)]
        mine = documents.lengths[~held]
        num_tokens, fewest = int(mine.sum(dtype=np.int64)), fewest_rows(mine, dataset.max_length)
        num_documents = len(documents)
    prepared = {
        "pad_id": tokenizer.pad_id,
        "max_length": dataset.max_length,
        "num_rows": num_rows[0],
        "num_tokens": num_tokens,
        "num_targets": writer.num_targets[0],
        "num_eval_rows": num_rows[1],
        "num_documents": num_documents,
        "fill": num_tokens / (num_rows[0] * dataset.max_length),
        "most_fill": num_tokens / (fewest * dataset.max_length),
        "counts": counts.reasons,
        "by_source": counts.sources,
        "first": counts.places,
        "notes": [*about(tokenizer, used=issubclass(shape, Chat | Preference | Judged)), *resolved.notes(shape)],
        "digest": writer.digest.hexdigest(),
        "settled": settled,
    }
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    write_meta(folder, parts=parts, shapes=[shape.__name__], sizes=sizes, prepared=prepared)


def write_meta(
    folder: Path, *, parts: Mapping[str, Any], shapes: list[str], sizes: Mapping[str, int], prepared: Mapping[str, Any]
) -> None:
    meta = {"parts": parts, "shapes": shapes, "bytes": sizes, "prepared": prepared}
    (folder / META).write_text(json.dumps(meta, indent=1, default=str) + "\n", encoding="utf-8")


@final
class _Writer:
    """Puts rows together out of documents, and takes a digest and counts on the way."""

    def __init__(self, documents: Documents, max_length: int, *, packing: bool, tell: Callable[[str], None]) -> None:
        self._documents, self._max_length, self._packing, self._tell = documents, max_length, packing, tell
        self.digest = xxhash.xxh3_128()
        self.num_targets: list[int] = []
        """Of each file."""

    def write(self, path: Path, chosen: NDArray[np.bool_]) -> int:
        """The rows of the documents that are chosen; returns how many these are."""
        self.num_targets.append(0)
        rows = self._counted(self._rows(chosen))
        num_rows = write_rows(path, rows, max_length=self._max_length, packed=self._packing)
        self.digest.update(f"{path.name} {num_rows}".encode())
        return num_rows

    def _rows(self, chosen: NDArray[np.bool_]) -> Iterator[Row]:
        lengths, first = self._documents.lengths, 0
        for begin in range(0, len(lengths), WINDOW):
            window = lengths[begin : begin + WINDOW]
            ends = first + np.cumsum(window, dtype=np.int64)
            starts, first = ends - window, int(ends[-1])
            mine = np.flatnonzero(chosen[begin : begin + WINDOW])
            packing = pack(window[mine].astype(np.int64), self._max_length) if self._packing else one_each(len(mine))
            for each in packing:
                yield self._documents.row(begin + mine[each], starts[mine[each]])

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for i, row in enumerate(rows):
            for array in (row.lengths, row.tokens, row.targets, row.labels):
                self.digest.update(np.ascontiguousarray(array).data)
            self.num_targets[-1] += row.num_targets
            if i % 1024 == 0:
                self._tell(f"writing: {i:,} rows")
            yield row


def hold_out(shares: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """Which documents are for eval: those whose share is below `fraction`; at least one text, and never all.

    Equal texts stay on one side. Where all are equal, none is held out.
    """
    return shares < held_below(shares, fraction)


def held_below(shares: NDArray[np.float64], fraction: float) -> float:
    """The share below which documents are held out, by the same rule."""
    least, most = float(shares.min()), float(shares.max())
    if fraction == 0 or least == most:
        return 0.0
    return max(min(fraction, most), math.nextafter(least, 1.0))


def peek(examples: Iterator[Example]) -> tuple[type[Example], Iterator[Example]]:
    """The shape of the first example that is one, and all of them. Raises DataError where there is none."""
    seen: list[Example] = []
    for example in examples:
        seen.append(example)
        if not isinstance(example, Skipped):
            return type(example), chain(seen, examples)
    counts = Counts()
    for example in seen:
        if isinstance(example, Skipped):
            counts.add(f"skipped: {example.reason}", example.source)
    told = f"; {', '.join(f'{num:,} {reason}' for reason, num in counts.reasons.items())}" if seen else ""
    raise DataError(f"dataset: no rows at all{told}; look at what dataset.path names")


def nothing_left(counts: Counts) -> DataError:
    stages = ", ".join(f"{num:,} {reason}" for reason, num in counts.reasons.items())
    return DataError(f"dataset: nothing left to train on: {stages}; add rows, or raise dataset.max_length")


def settled_by(objective: ObjectiveSpec, examples: Iterable[Example]) -> tuple[ObjectiveSpec, dict[str, Any]]:
    """The objective with what it settles by these examples, and those values alone."""
    settled = dict(objective.settle(example for example in examples if not isinstance(example, Skipped)))
    return dataclasses.replace(cast("Any", objective), **settled) if settled else objective, settled


def encoder_of(
    dataset: DatasetSpec, objective: ObjectiveSpec, shape: type[Example], assets: Path, seed: int
) -> Encoder:
    """What encodes rows of this shape."""
    limit = Limit(dataset.max_length, _on_long(dataset, shape), objective.keeps_targets)
    return Encoder(objective, partial(TextTokenizer.load, assets), limit, seed)


def _on_long(dataset: DatasetSpec, shape: type[Example]) -> OnLong:
    if dataset.on_long == "auto":
        return "split" if issubclass(shape, Text) else "truncate"
    return dataset.on_long
