"""The beginning of a stream, looked at before it runs: rows to evaluate on, and what has to be settled for all ranks.
Runs in the parent, without torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dtrain.config.spec import DatasetSpec, ObjectiveSpec
from dtrain.data.build import encoder_of, held_below, nothing_left, peek, settled_by, write_meta
from dtrain.data.counts import Counts
from dtrain.data.encode import Encoder, share
from dtrain.data.prepared import FILES, Facts, Prepared
from dtrain.data.rows import Row
from dtrain.data.store import write_rows
from dtrain.data.stream import WINDOW_CHARS, Place, Shards, rows_of
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRows
from dtrain.datasets.base import Chat, Example, Judged, Preference, Skipped

LOOKED_AT = 50_000
LOOKED_AT_CHARS = 2**26
"""Documents, and their text, that are looked at for those to hold out."""
COUNTED_CHARS = 2**21
"""Text of a dataset so small that the rows of an epoch are counted."""
TRIED_TOKENS = 2**18
"""Of a larger one, to see what rows come of it."""
DOCUMENTS_A_SHARD = 64
"""Of fewer, a shard's rows would be badly filled, and its passes too short to shuffle."""

_PLACES = ("dataset.path", "dataset.name")


def look(
    folder: Path,
    dataset: DatasetSpec,
    objective: ObjectiveSpec,
    assets: Path,
    about: Callable[..., list[str]],
    parts: Mapping[str, Any],
    tell: Callable[[str], None],
) -> None:
    """As `build`, of the beginning of a stream: rows to evaluate on, and `Facts`. Raises DataError."""
    shape, examples = peek(_in_order(dataset))
    seed = parts["run.seed"]
    resolved, settled = settled_by(objective.resolve(shape), beginning(dataset))
    encoder = encoder_of(dataset, resolved, shape, assets, seed)
    tokenizer = encoder.load()
    head = _read(examples, seed, parts["eval.fraction"], tell)
    shards = dataset.stream_shards
    if head.whole:
        shards = max(1, min(shards, head.num // DOCUMENTS_A_SHARD))
    counted = head.whole and head.chars <= COUNTED_CHARS
    facts = Facts(shards=shards, asked_shards=dataset.stream_shards, held_below=head.held_below, shape=shape.__name__,
                  content=parts["content of the dataset"], whole=counted, num_examples=head.num,
                  num_held=len(head.held))  # fmt: skip
    tried = _try(dataset, facts, encoder, tokenizer, tell)
    if not tried.rows:
        raise nothing_left(tried.counts)
    held_rows = _held_rows(dataset, encoder, tokenizer, head)
    write_rows(folder / FILES[1], held_rows, max_length=dataset.max_length, packed=dataset.packing)
    num_tokens = sum(len(row.tokens) for row in tried.rows)
    prepared = {
        "pad_id": tokenizer.pad_id,
        "max_length": dataset.max_length,
        "num_rows": len(tried.rows),
        "num_tokens": num_tokens,
        "num_targets": sum(row.num_targets for row in tried.rows),
        "num_eval_rows": len(held_rows),
        "num_documents": sum(len(row.lengths) for row in tried.rows),
        "fill": num_tokens / (len(tried.rows) * dataset.max_length),
        "counts": tried.counts.reasons,
        "by_source": tried.counts.sources,
        "first": tried.counts.places,
        "notes": [*about(tokenizer, used=issubclass(shape, Chat | Preference | Judged)), *resolved.notes(shape)],
        "digest": _digest(parts, shards),
        "settled": settled,
        "streams": {"all": dataclasses.asdict(facts)},
    }
    sizes = {FILES[1]: (folder / FILES[1]).stat().st_size}
    write_meta(folder, parts=parts, shapes=[shape.__name__], sizes=sizes, prepared=prepared)


def beginning(dataset: DatasetSpec) -> Iterator[Example]:
    """Of a stream, as much as is looked at; of a mixture, of one source after the other. Raises DataError."""
    parts = dataset.parts()
    for one in [dataset] if parts is None else parts.datasets.values():
        chars = 0
        for example in _in_order(one):
            yield example
            chars += sum(map(len, example.texts()))
            if chars >= LOOKED_AT_CHARS:
                break


def facts_of(made: Mapping[str, Prepared]) -> dict[str, Any]:
    """Of each stream of a mixture, whose epoch has no end that could be counted."""
    return {name: dataclasses.asdict(dataclasses.replace(one.streams["all"], whole=False))
            for name, one in made.items()}  # fmt: skip


def _digest(parts: Mapping[str, Any], shards: int) -> str:
    """Of all that the rows depend on, wherever the data lies: its content is among it."""
    said = {name: value for name, value in parts.items() if name not in _PLACES}
    return xxhash.xxh3_128_hexdigest(json.dumps([said, shards], sort_keys=True, default=str).encode())


def _in_order(dataset: DatasetSpec) -> Iterator[Example]:
    return (example for span in dataset.spans() for example in dataset.read(span))


@dataclasses.dataclass(slots=True)
class _Head:
    num: int
    chars: int
    held: list[Example]
    held_below: float
    whole: bool
    """Whether nothing comes after it."""


def _read(examples: Iterator[Example], seed: int, fraction: float, tell: Callable[[str], None]) -> _Head:
    shares: list[float] = []
    near: list[tuple[float, Example]] = []
    least, chars, whole = 1.0, 0, True
    for example in examples:
        if isinstance(example, Skipped):
            continue
        if len(shares) >= LOOKED_AT or chars >= LOOKED_AT_CHARS:
            whole = False
            break
        part = share(example, seed)
        shares.append(part)
        chars += sum(map(len, example.texts()))
        if part < fraction or part <= least:  # the least one is held out where none is below
            near.append((part, example))
        least = min(least, part)
        if len(shares) % 1024 == 0:
            tell(f"looking at the beginning: {len(shares):,} documents")
    below = held_below(np.array(shares), fraction)
    return _Head(len(shares), chars, [example for part, example in near if part < below], below, whole)


@dataclasses.dataclass(slots=True)
class _Tried:
    rows: list[Row] = dataclasses.field(default_factory=list)
    counts: Counts = dataclasses.field(default_factory=Counts)


def _try(dataset: DatasetSpec, facts: Facts, encoder: Encoder, tokenizer: TextTokenizer,
         tell: Callable[[str], None]) -> _Tried:  # fmt: skip
    """A pass where its rows are to be counted; else the first windows of the shards in turn."""
    shards = Shards(dataset, facts, encoder, tokenizer, {shard: Place() for shard in range(facts.shards)})
    tried, num_tokens, left = _Tried(), 0, deque(range(facts.shards))
    while left and (facts.whole or num_tokens < TRIED_TOKENS):
        shard = left.popleft()
        window = shards.window(shard)
        tried.rows += window.rows
        tried.counts.update(window.counts)
        num_tokens += sum(len(row.tokens) for row in window.rows)
        tell(f"trying: {len(tried.rows):,} rows")
        if not window.end.epoch:
            left.append(shard)
    for places in tried.counts.places.values():
        places[:] = [dataset.told(place) for place in places]
    return tried


def _held_rows(dataset: DatasetSpec, encoder: Encoder, tokenizer: TextTokenizer, head: _Head) -> list[Row]:
    rows: list[Row] = []
    bad, chunk, chars = BadRows.of(dataset), [], 0
    for i, example in enumerate(head.held):
        chunk.append(example)
        chars += sum(map(len, example.texts()))
        if chars >= WINDOW_CHARS or i == len(head.held) - 1:
            encoded = encoder.encode(chunk, tokenizer)
            for skipped, text in encoded.bad:
                bad.count(skipped, text)
            bad.num_good += encoded.num_good
            rows += rows_of(encoded, dataset, (encoder.seed, len(rows)))
            chunk, chars = [], 0
    if bad.fatal:
        bad.check()
    return rows
