"""Rows of a dataset that is read while training: a fixed number of shards, each an endless sequence of rows of its own.

What a shard's rows are depends on the data, the settings and the seed, on nothing else: sample k of a run is a row of
the shard whose turn it is, whichever rank makes it. A shard is read a window of documents at a time; they are
tokenised, shuffled among each other and packed, and no row goes beyond them. So where a shard is, is said by four
numbers, and a window is made again from where it begins. Without torch.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import final

import numpy as np

from dtrain.config.spec import DatasetSpec, Span
from dtrain.data.counts import HELD_OUT, READ, Counts
from dtrain.data.documents import decoded
from dtrain.data.encode import Encoded, Encoder, share
from dtrain.data.order import shuffled
from dtrain.data.pack import in_order, one_each, pack
from dtrain.data.prepared import Facts
from dtrain.data.rows import Row
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRows
from dtrain.datasets.base import SHAPES, Example, Skipped
from dtrain.errors import DataError

WINDOW_CHARS, WINDOW_ROWS = 2**18, 32
"""Text of a window, about, or that of so many rows if it is more: of long documents it holds fewer than
`stream_buffer`, so that memory is bounded."""
CHARS_A_TOKEN = 4
FIRST_WINDOW = 1 / 8
"""Size of the first window of the first shard, as a part of a whole one."""
IN_ORDER_WINDOW = 256
"""Documents of a window where nothing is shuffled."""
SPANS_A_SHARD = 4
"""Spans are dealt out whole where there are so many for each shard; where there are fewer, single documents are."""
WAITING_CHARS = 2**26
"""Text that shards which read together may leave for each other; beyond it one of them reads by itself."""
CHECKED_AFTER = 1000
"""Rows after which `max_bad_fraction` counts: of fewer, a share says nothing."""
_DEAL_SPANS, _DEAL_DOCUMENTS, _SHUFFLE = 6, 7, 8
"""What an order of the same seed is for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a shard is: at the beginning of a window."""

    epoch: int = 0
    """Passes that it has ended."""
    span: int = 0
    """Of those that it reads in this pass."""
    offset: int = 0
    """Documents of the span, or of the shard's where it shares spans with others, that it has taken."""
    rows: int = 0
    """That it has made before, over all passes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    start: Place
    end: Place
    rows: Sequence[Row]
    counts: Counts
    """What became of the examples in it."""


@final
class Deal:
    """Which documents a shard takes in a pass, and in which order: each document goes to one shard."""

    def __init__(self, spans: Sequence[Span], shards: int, seed: Sequence[int], *, keep_order: bool) -> None:
        self._spans, self._shards, self._seed, self._keep_order = spans, shards, seed, keep_order
        self.by_spans = len(spans) >= SPANS_A_SHARD * shards
        # Two: shards may be in different passes.
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._turns = lru_cache(maxsize=2)(self._turns_of)

    def spans(self, epoch: int) -> list[Span]:
        """All of a pass, as they are read one after the other."""
        return self._order(epoch)

    def spans_of(self, shard: int, epoch: int) -> list[Span]:
        """Where whole ones are dealt out."""
        return self._order(epoch)[shard :: self._shards]

    def shard_of(self, document: int, epoch: int) -> int:
        """Where single ones are dealt out: as many to each, and by chance, so that what repeats in the data falls on
        all shards alike.
        """
        block, turn = divmod(document, self._shards)
        return turn if self._keep_order else self._turns(block, epoch)[turn]

    def _order_of(self, epoch: int) -> list[Span]:
        if self._keep_order:
            return list(self._spans)
        return [self._spans[i] for i in shuffled(len(self._spans), *self._seed, epoch, _DEAL_SPANS).tolist()]

    def _turns_of(self, block: int, epoch: int) -> list[int]:
        turns: list[int] = shuffled(self._shards, *self._seed, epoch, block, _DEAL_DOCUMENTS).tolist()
        return turns


@final
class Along:
    """One pass over the source that several shards read together. What is of a shard that has not asked for it yet
    waits; where too much would wait, a shard is left behind and has to read by itself.
    """

    def __init__(self, rows: Iterator[Example], shard_of: Callable[[int], int], taken: Mapping[int, int]) -> None:
        """`taken`: the shards that read along, and how many of their documents they have had."""
        self._rows, self._shard_of = rows, shard_of
        self._had = dict(taken)
        self._waiting: dict[int, deque[Example]] = {shard: deque() for shard in taken}
        self._number = self._chars = 0

    def __contains__(self, shard: int) -> bool:
        return shard in self._waiting

    def leave(self, shard: int) -> None:
        for example in self._waiting.pop(shard, ()):
            self._chars -= _chars(example)

    def next(self, shard: int) -> Example | None:
        """The shard's next document, or None at the end of the pass."""
        waiting = self._waiting[shard]
        while not waiting:
            example = next(self._rows, None)
            if example is None:
                return None
            of, self._number = self._shard_of(self._number), self._number + 1
            if of not in self._waiting:
                continue
            if self._had[of]:
                self._had[of] -= 1
                continue
            self._waiting[of].append(example)
            self._chars += _chars(example)
            while self._chars > WAITING_CHARS and len(self._waiting) > 1:
                self.leave(max((one for one in self._waiting if one != shard), key=lambda one: len(self._waiting[one])))
        example = waiting.popleft()
        self._chars -= _chars(example)
        return example


@final
class Shards:
    """Some of a dataset's shards, each at a place of its own; `window` goes on with one of them."""

    def __init__(self, dataset: DatasetSpec, facts: Facts, encoder: Encoder, tokenizer: TextTokenizer,
                 at: Mapping[int, Place], *, stream: int = 0) -> None:  # fmt: skip
        """`at`: where each begins. `stream`: the number of the dataset in a mixture. Raises DataError."""
        self._dataset, self._facts, self._encoder, self._tokenizer = dataset, facts, encoder, tokenizer
        self._seed = (encoder.seed, stream)
        self.deal = Deal(dataset.spans(), facts.shards, self._seed, keep_order=dataset.stream_buffer == 1)
        self._at = dict(at)
        self._along: dict[tuple[int, int], Along] = {}
        """By pass and shard."""
        self._documents = {shard: self._read(shard) for shard in at}
        self._bad = BadRows.of(dataset)
        self.num_read = 0
        """Documents that the source gave so far, to see that it gives any."""
        self._rows_of_pass = {shard: 0 for shard, place in at.items() if place.offset == place.span == 0}
        """Of the shards whose pass was begun here."""

    def window(self, shard: int) -> Window:
        """The shard's next one; it may be without rows. Raises DataError where the source fails, a row cannot be used
        and that is an error, or a pass has nothing to train on.
        """
        start = self._at[shard]
        examples, span, offset, ended = self._take(shard)
        rows, counts = self._make(examples, shard, start)
        end = Place(start.epoch, span, offset, start.rows + len(rows))
        if shard in self._rows_of_pass:
            self._rows_of_pass[shard] += len(rows)
        if ended:
            if self._rows_of_pass.get(shard) == 0:
                raise DataError(f"dataset.stream_shards={self._dataset.stream_shards}: shard {shard} of "
                                f"{self._facts.shards} has no document to train on; use fewer, or "
                                f"dataset.streaming=false")  # fmt: skip
            self._rows_of_pass[shard] = 0
            end = Place(start.epoch + 1, 0, 0, end.rows)
        self._at[shard] = end
        if ended:
            self._documents[shard] = self._read(shard)
        return Window(start, end, rows, counts)

    def _take(self, shard: int) -> tuple[list[Example], int, int, bool]:
        """The documents of a window; where the next begins, and whether that is the next pass."""
        place = self._at[shard]
        size = self._dataset.stream_buffer if self._dataset.stream_buffer > 1 else IN_ORDER_WINDOW
        most = max(WINDOW_CHARS, WINDOW_ROWS * CHARS_A_TOKEN * self._dataset.max_length)
        if place == Place():
            # The shards' first windows are of different size, the first one's the smallest: the first step waits for
            # little, and later on the shards do not all come to the end of a window at the same step.
            part = FIRST_WINDOW + (1 - FIRST_WINDOW) * shard / self._facts.shards
            size, most = max(1, int(size * part)), int(most * part)
        examples: list[Example] = []
        span, offset, chars = place.span, place.offset, 0
        for span, offset, example in self._documents[shard]:
            examples.append(example)
            chars += _chars(example)
            if len(examples) >= size or chars >= most:
                return examples, span, offset, False
        return examples, span, offset, True

    def _read(self, shard: int) -> Iterator[tuple[int, int, Example]]:
        """The rest of its pass: span, how many documents of it that makes, and the document."""
        place = self._at[shard]
        if not self.deal.by_spans:
            yield from self._read_along(shard, place)
            return
        spans = self.deal.spans_of(shard, place.epoch)
        for i in range(place.span, len(spans)):
            had = place.offset if i == place.span else 0
            for number, example in enumerate(self._counted(spans[i]), start=1):
                if number > had:
                    yield i, number, example

    def _read_along(self, shard: int, place: Place) -> Iterator[tuple[int, int, Example]]:
        number, key = place.offset, (place.epoch, shard)
        while True:
            if shard not in self._along.get(key, ()):
                self._along[key] = self._begin(shard, place.epoch, number)
            example = self._along[key].next(shard)
            if example is None:
                self._along.pop(key).leave(shard)
                return
            number += 1
            yield 0, number, example

    def _begin(self, shard: int, epoch: int, had: int) -> Along:
        """A reading of the pass for a shard, and for those that have not begun with this pass or not been read yet."""
        taken = {shard: had}
        for other, at in self._at.items():
            if other != shard and at.epoch <= epoch and other not in self._along.get((epoch, other), ()):
                taken[other] = at.offset if at.epoch == epoch else 0
        rows = (example for span in self.deal.spans(epoch) for example in self._counted(span))
        found = Along(rows, lambda document: self.deal.shard_of(document, epoch), taken)
        self._along.update({(epoch, other): found for other in taken})
        return found

    def _counted(self, span: Span) -> Iterator[Example]:
        for example in self._dataset.read(span):
            self.num_read += 1
            yield example

    def _make(self, examples: Sequence[Example], shard: int, start: Place) -> tuple[list[Row], Counts]:
        shape = SHAPES[self._facts.shape]
        kept: list[Example] = []
        held = Counts()
        for example in examples:
            if isinstance(example, Skipped):
                kept.append(example)
            elif type(example) is not shape:
                raise DataError(f"{self._dataset.told(example.source)}: {type(example).__name__.lower()} among rows of "
                                f"{shape.__name__.lower()}; make all rows of one kind")  # fmt: skip
            elif share(example, self._encoder.seed) < self._facts.held_below:
                held.add(READ, example.source)
                held.add(HELD_OUT, example.source)
            else:
                kept.append(example)
        encoded = self._encoder.encode(kept, self._tokenizer)
        self._judge(encoded)
        encoded.counts.update(held)
        seed = (*self._seed, shard, start.epoch, start.span, start.offset)
        return list(rows_of(encoded, self._dataset, seed)), encoded.counts

    def _judge(self, encoded: Encoded) -> None:
        """Raises DataError where bad rows are an error, or too many."""
        for skipped, text in encoded.bad:
            source = self._dataset.told(skipped.source)
            said = f"{source}{text.removeprefix(skipped.source)}" if text else ""
            self._bad.count(dataclasses.replace(skipped, source=source), said)
        self._bad.num_good += encoded.num_good
        if self._bad.fatal or self._bad.num + self._bad.num_good >= CHECKED_AFTER:
            self._bad.check()


def rows_of(encoded: Encoded, dataset: DatasetSpec, seed: Sequence[int]) -> Iterator[Row]:
    """The documents of a window as rows: shuffled by `seed` and packed as full as can be, or in order."""
    lengths = encoded.lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    shuffles = dataset.stream_buffer > 1
    order = shuffled(len(lengths), *seed, _SHUFFLE) if shuffles else np.arange(len(lengths))
    if not dataset.packing:
        packing = one_each(len(lengths))
    else:
        packing = (pack if shuffles else in_order)(lengths[order], dataset.max_length)
    for chosen in packing:
        documents = order[chosen]
        codes = np.concatenate([encoded.codes[starts[i] : starts[i] + lengths[i]] for i in documents.tolist()])
        yield decoded(codes, encoded.labels[documents] if len(encoded.labels) else encoded.labels)


def _chars(example: Example) -> int:
    return 64 + sum(map(len, example.texts()))
