"""The batches of one rank out of streams: read, tokenised and packed in a thread while the last step is computed."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from dtrain.config.spec import DatasetSpec
from dtrain.data.build import encoder_of
from dtrain.data.counts import Counts
from dtrain.data.encode import Encoder
from dtrain.data.order import Mixed
from dtrain.data.prepared import Facts, Prepared
from dtrain.data.rows import Row
from dtrain.data.stream import Place, Shards, Window
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.base import SHAPES
from dtrain.errors import DataError
from dtrain.plan.batch import BatchPlan

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.data.batch import Batch

Ints = NDArray[np.int64]
Submit = Callable[[Callable[[], Window]], "Future[Window]"]
Collate = Callable[[Sequence[Row], Sequence[int], int], "Batch"]
"""The micro-batch of rows, with their ids and the padding token."""
BLOB = "stream"
"""Under which a rank's part of a checkpoint says where its shards are."""
LOOK_S = 1.0
"""How often a step that has to wait for its data looks whether there comes any."""
_ENDLESS = 2**40
"""Samples of a source in a mixture of streams, none of which ends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Streamed:
    """One dataset that is streamed."""

    dataset: DatasetSpec
    facts: Facts
    encoder: Encoder
    rate: float = 1.0
    """Its samples for each of the mixture, up to a common factor."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it is: the sample's source, the shard there, and which of the shard's rows it is."""

    source: int
    shard: int
    row: int


@final
class Streams:
    """Rows in the order of training, of one stream or of several in a mixture: what stands in for a store of rows."""

    def __init__(self, sources: Mapping[str, Streamed], tokenizer: TextTokenizer, digest: str, *, seed: int) -> None:
        """`digest`: of all that the rows depend on."""
        self.sources, self.digest = dict(sources), digest
        self._tokenizer = tokenizer
        self._shards = [source.facts.shards for source in self.sources.values()]
        self._first_shards: list[int] = np.cumsum([0, *self._shards]).tolist()
        several = len(self._shards) > 1
        rates = [source.rate for source in self.sources.values()]
        self._mixed = Mixed(seed, [_ENDLESS] * len(rates), rates, "repeat") if several else None

    @property
    def num_shards(self) -> int:
        """Of all sources."""
        return self._first_shards[-1]

    @property
    def packed(self) -> bool:
        return all(source.dataset.packing for source in self.sources.values())

    def turns(self, first: int, count: int) -> list[Turn]:
        """Of the samples at `first` to `first + count`: sources by their rates, the shards of each in rotation."""
        if self._mixed is None:
            sources, numbers = [0] * count, list(range(first, first + count))
        else:
            sources, numbers = (each.tolist() for each in self._mixed.places(first, count))
        return [Turn(k, n % self._shards[k], n // self._shards[k]) for k, n in zip(sources, numbers, strict=True)]

    def rank_of(self, turn: Turn, size: int) -> int:
        """Which of `size` ranks makes this sample: each shard is one rank's, unless there are fewer shards than ranks.
        Then the rows of each are dealt out too, and all ranks read all of it.
        """
        if self._shards[turn.source] >= size:
            return (self._first_shards[turn.source] + turn.shard) % size
        return (turn.row * self._shards[turn.source] + turn.shard) % size

    def read_by(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Source and shard of all that a rank has to read."""
        return [(k, shard) for k, num in enumerate(self._shards) for shard in range(num)
                if num < size or (self._first_shards[k] + shard) % size == rank]  # fmt: skip

    def counts(self, samples: int) -> Sequence[int]:
        """Of each source, how many of so many samples are its."""
        return (samples,) if self._mixed is None else self._mixed.before(samples).counts

    def next_rows(self, samples: int) -> dict[tuple[int, int], int]:
        """Of each shard, by source and shard, its first row that is not among so many samples."""
        counts = self.counts(samples)
        return {(k, shard): max(0, -((shard - counts[k]) // num))
                for k, num in enumerate(self._shards) for shard in range(num)}  # fmt: skip

    def number(self, source: int, shard: int) -> int:
        """Of a shard among those of all sources."""
        return self._first_shards[source] + shard

    def lanes(self, which: Sequence[tuple[int, int]], at: Mapping[int, Place],
              submit: Submit) -> tuple[dict[tuple[int, int], Lane], list[Shards]]:  # fmt: skip
        """Of these shards, by source and shard, and what reads them; `at`: where each begins, by number. Raises
        DataError.
        """
        lanes, readers = {}, []
        for k, source in enumerate(self.sources.values()):
            mine = {shard: at.get(self.number(k, shard), Place()) for each, shard in which if each == k}
            shards = Shards(source.dataset, source.facts, source.encoder, self._tokenizer, mine, stream=k)
            lanes.update({(k, shard): Lane(shards, shard, place, submit) for shard, place in mine.items()})
            readers.append(shards)
        return lanes, readers

    def samples(self, limit: int) -> Iterator[Row]:
        """The first of a run, one after the other, read here and now. Raises DataError."""
        which = [(k, shard) for k, num in enumerate(self._shards) for shard in range(num)]
        lanes, _ = self.lanes(which, {}, _now)
        for turn in self.turns(0, limit):
            yield lanes[turn.source, turn.shard].row(turn.row)


@final
class Lane:
    """The rows of one shard, asked for in their order; the window after the one in use is made ahead."""

    def __init__(self, shards: Shards, shard: int, place: Place, submit: Submit) -> None:
        self._make = lambda: shards.window(shard)
        self._submit = submit
        self._windows: deque[Window] = deque()
        self._ahead: Future[Window] | None = None
        self._end = place
        self.done: list[Window] = []
        """Windows that are used up, for whoever counts them."""

    def begin(self) -> None:
        """Make the next window ahead."""
        if self._ahead is None:
            self._ahead = self._submit(self._make)

    def row(self, number: int) -> Row:
        """The row of this number, counted from the shard's first; those before it are let go. Raises DataError."""
        while number >= self._end.rows:
            self.begin()
            assert self._ahead is not None
            window, self._ahead = self._ahead.result(), None
            self._windows.append(window)
            self._end = window.end
        self._let_go(number)
        if len(self._windows) == 1:
            self.begin()
        window = self._windows[0]
        return window.rows[number - window.start.rows]

    def place(self, number: int) -> Place:
        """From where the row of this number, and those after it, can be made again; none before it is asked for."""
        self._let_go(number)
        return self._windows[0].start if self._windows else self._end

    def _let_go(self, number: int) -> None:
        while self._windows and self._windows[0].end.rows <= number:
            self.done.append(self._windows.popleft())


def _now(make: Callable[[], Window]) -> Future[Window]:
    future: Future[Window] = Future()
    future.set_result(make())
    return future


def merged(state: Mapping[str, Any], blobs: Iterable[bytes]) -> dict[str, Any]:
    """What `StreamLoader` goes on from, out of what its `state` said and the `blobs` of all ranks."""
    counts = Counter(state["counts"])
    consumed = {name: Counter(one) for name, one in state["consumed"].items()}
    at: dict[str, list[int]] = {}
    for said in map(json.loads, blobs):
        counts.update(said["counts"])
        for name, one in said["consumed"].items():
            consumed.setdefault(name, Counter()).update(one)
        at.update(said["at"])
    return {**state, "at": at, "counts": dict(counts), "consumed": {name: dict(one) for name, one in consumed.items()}}


@final
class StreamLoader:
    """Training batches out of streams, step after step; the next step's are made while one is computed."""

    def __init__(  # noqa: PLR0913 - all that batches depend on
                 self, streams: Streams, batch: BatchPlan, *, rank: int, pad_id: int, collate: Collate,
                 samples: int = 0, state: Mapping[str, Any] | None = None,
                 alive: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        """`samples`: those of the run before. `state`: what was `merged` of them; that of other data counts for
        nothing, and the stream begins with its first sample. `alive` is called now and then while a step has to wait
        for a source that is slow, but gives something. Raises DataError.
        """
        self._alive = alive
        self._streams, self._batch, self._rank, self._pad_id = streams, batch, rank, pad_id
        self._collate = collate
        goes_on = state is not None and state["data"] == streams.digest
        said: Mapping[str, Any] = {"first": samples, "at": {}, "counts": {}, "consumed": {}}
        if goes_on and state is not None:
            said = state
        self._first, self._samples = int(said["first"]), samples
        self._before = {"data": streams.digest, "first": self._first, "counts": dict(said["counts"]),
                        "consumed": dict(said["consumed"])}  # fmt: skip
        self.line = _line(streams, batch.size, samples - self._first if goes_on else None)
        at = {int(number): Place(*place) for number, place in said["at"].items()}
        # Two threads: one puts batches together, and waits for the other, which tokenises.
        self._reading, self._batching = ThreadPoolExecutor(1, "stream"), ThreadPoolExecutor(1, "loader")
        self._lanes, self._readers = streams.lanes(streams.read_by(rank, batch.size), at, self._reading.submit)
        self._counts = Counts()
        self._names = list(streams.sources)
        self._consumed = {name: {"samples": 0, "tokens": 0} for name in streams.sources}
        """Of each source on this rank since this began."""
        self._ahead: Future[list[Batch]] | None = None
        self._here = {samples: self._where()}
        """By samples of the run: before the step that was taken last, and before the next."""
        for turn in streams.turns(samples - self._first, streams.num_shards):
            if (turn.source, turn.shard) in self._lanes:
                self._lanes[turn.source, turn.shard].begin()

    def window(self, samples: int) -> list[Batch]:
        """As `Loader.window`, for one step after the other."""
        assert samples == self._samples, (samples, self._samples)
        ahead = self._ahead or self._batching.submit(self._make, samples)
        seen = -1
        while not wait([ahead], timeout=LOOK_S).done:
            if seen != (seen := sum(reader.num_read for reader in self._readers)):
                self._alive()
        batches = ahead.result()
        self._samples = samples + self._batch.global_batch
        self._here = {samples: self._here[samples], self._samples: self._where()}  # before the next step is begun
        self._ahead = self._batching.submit(self._make, self._samples)
        return batches

    def epoch(self, samples: int) -> float:
        """Passes that all shards of this rank have ended."""
        return float(min((place[0] for place in self._here[samples]["at"].values()), default=0))

    def consumed(self, samples: int) -> dict[str, dict[str, int]]:
        """Samples of each source. Their tokens are known to those alone who made them."""
        since = self._streams.counts(samples - self._first)
        return {name: {"samples": num} for name, num in zip(self._names, since, strict=True)}

    def state(self, samples: int) -> dict[str, Any]:
        """The same on all ranks."""
        return self._before

    def blobs(self, samples: int) -> dict[str, bytes]:
        return {BLOB: json.dumps(self._here[samples]).encode()}

    def gathered(self, samples: int, comm: AbstractComm) -> dict[str, Any]:
        blobs = comm.gather(self.blobs(samples)[BLOB].decode())
        return merged(self.state(samples), [blob.encode() for blob in blobs])

    def close(self) -> None:
        """End the threads, once what they are at is done."""
        for pool in (self._batching, self._reading):
            pool.shutdown(wait=False, cancel_futures=True)

    def _where(self) -> dict[str, Any]:
        """Where this rank's shards are at the end of a step, and what came of them until then."""
        after, at = self._streams.next_rows(self._samples - self._first), {}
        for (k, shard), lane in self._lanes.items():
            number, place = self._streams.number(k, shard), lane.place(after[k, shard])
            if number % self._batch.size == self._rank:  # one of the ranks, where several read it
                at[str(number)] = list(dataclasses.astuple(place))
                for window in lane.done:
                    self._counts.update(window.counts)
            lane.done.clear()
        consumed = {name: dict(numbers) for name, numbers in self._consumed.items()}
        return {"at": at, "counts": dict(self._counts.reasons), "consumed": consumed}

    def _make(self, samples: int) -> list[Batch]:
        """Every rank gets the same number of micro-batches, however the turns fall."""
        turns = self._streams.turns(samples - self._first, self._batch.global_batch)
        ranks = [self._streams.rank_of(turn, self._batch.size) for turn in turns]
        mine: list[tuple[int, Row]] = []
        for i, turn in enumerate(turns):
            if ranks[i] == self._rank:
                row = self._lanes[turn.source, turn.shard].row(turn.row)
                mine.append((samples + i, row))
                consumed = self._consumed[self._names[turn.source]]
                consumed["samples"] += 1
                consumed["tokens"] += len(row.tokens)
        if not self._streams.packed:
            mine.sort(key=lambda one: -len(one[1].tokens))
        most = max(ranks.count(rank) for rank in set(ranks))
        num_micros = -(-most // self._batch.micro_batch)
        cuts = [i * len(mine) // num_micros for i in range(num_micros + 1)]
        parts = [mine[start:end] for start, end in pairwise(cuts)]
        return [self._collate([row for _, row in part], [i for i, _ in part], self._pad_id) for part in parts]


def open_streams(prepared: Prepared, dataset: DatasetSpec, seed: int) -> Streams:
    """What `prepare` has looked at. Raises DataError where it is not the same any more, or not here."""
    parts = dataset.parts()
    datasets = {"all": dataset} if parts is None else parts.datasets
    rates = {source.name: source.rate for source in prepared.sources}
    tokenizer = TextTokenizer.load(prepared.assets)
    sources = {}
    for name, facts in prepared.streams.items():
        one = datasets[name]
        if one.digest() != facts.content:
            raise DataError(f"dataset{f'.sources.{name}' * bool(rates)}: is not on {platform.node()} what it was when "
                            f"the run was prepared: all nodes must see the same files, and they may not change while "
                            f"they are read")  # fmt: skip
        encoder = encoder_of(one, prepared.objective, SHAPES[facts.shape], prepared.assets, seed)
        sources[name] = Streamed(one, facts, encoder, rates.get(name, 1.0))
    return Streams(sources, tokenizer, prepared.digest, seed=seed)


def _line(streams: Streams, size: int, gone_on: int | None) -> str:
    """What runs, in words."""
    began = "from the beginning" if gone_on is None else f"going on after {gone_on:,} samples"
    least = min(source.facts.shards for source in streams.sources.values())
    if size == 1:
        read = "all read by the one rank"
    elif least >= size:
        read = "each read by one rank"
    else:
        read = f"fewer than ranks, so that all {size} read the same; dataset.stream_shards={size} or more avoids that"
    num = streams.num_shards
    return f"data: streaming {began}; {num:,} shard{'s' * (num > 1)}, {read}"
