"""Examples to documents: token ids and targets, none longer than a row, and a count of all that was left out."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import resource_tracker

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.config.spec import ObjectiveSpec, OnLong
from dtrain.data.counts import CUT_OFF, CUT_OFF_LEARNED, PLACEHOLDER, READ, Counts
from dtrain.data.documents import Documents, coded
from dtrain.data.rows import Row
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.badrows import BadRowError, BadRows, LeftOutError
from dtrain.datasets.base import Example, Skipped
from dtrain.errors import DataError
from dtrain.plan.machine import num_cores

CHUNK_CHARS = 256_000
"""Text that a process encodes at a time."""
SMALL_CHARS = 1_000_000
"""Less is encoded here: to start processes takes longer."""
MOST_PROCESSES = 16
"""Each has a tokenizer of its own in memory, and one process reads for all."""
_SKIPPED, _LEFT_OUT = "skipped: {}", "bad, left out: {}"
_PLACEHOLDER = re.compile(r"(?<![A-Za-z0-9$^_{\\])\{\{ ?([^\W\d][\w.-]{0,40}) ?\}\}(?!\})")
"""Not what GitHub's workflows and formulas of TeX have in double braces."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    max_length: int
    on_long: OnLong
    """Never `auto`."""
    keeps_targets: bool = False
    """Of an example that is truncated what comes before its first target is cut, but for one token, not its end."""


@dataclasses.dataclass(frozen=True, slots=True)
class Encoder:
    """From examples to documents, the same in every process."""

    objective: ObjectiveSpec
    load: Callable[[], TextTokenizer]
    limit: Limit
    seed: int

    def encode(self, examples: list[Example], tokenizer: TextTokenizer) -> Encoded:
        rows: list[Row] = []
        shares: list[float] = []
        done = Encoded(num_examples=len(examples))
        good = self.objective.together([example for example in examples if not isinstance(example, Skipped)])
        together, following = iter(self.objective.encode_many(good, tokenizer) or ()), iter(good)
        for one in examples:
            if isinstance(one, Skipped):
                done.skip(one)
                continue
            example = next(following)
            done.counts.add(READ, example.source)
            done.look_at(example)
            try:
                row = next(together, None) or self.objective.encode(example, tokenizer)
                if self.objective.learns_tokens and not row.targets.any():
                    raise BadRowError("no token to learn")
                pieces = _fit(row, self.limit, example.source, done.counts)
            except LeftOutError as error:
                done.num_good += 1
                done.counts.add(f"left out: {error}", example.source)
                continue
            except BadRowError as error:
                done.refuse(example.source, error)
                continue
            done.num_good += 1
            part = share(example, self.seed)
            for piece in pieces:
                if piece is row or piece.targets.any() or not self.objective.learns_tokens:
                    rows.append(piece)
                    shares.append(part)
                else:
                    done.counts.add("left out: no token to learn", example.source)
        if rows:
            done.codes = np.concatenate([coded(row) for row in rows])
            done.lengths = np.array([len(row.tokens) for row in rows], np.int32)
            done.shares = np.array(shares, np.float64)
            done.labels = np.concatenate([row.labels for row in rows])
        return done


@dataclasses.dataclass(slots=True)
class Encoded:
    """What became of some examples; in the order in which they came."""

    num_examples: int = 0
    num_good: int = 0
    num_bytes: int = 0
    """Of text."""
    codes: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    lengths: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    shares: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty(0, np.float64))
    """Of each document a number in [0, 1) that only its example's text and the seed decide; the same for all pieces."""
    labels: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    """Of each document, or none."""
    counts: Counts = dataclasses.field(default_factory=Counts)
    bad: list[tuple[Skipped, str]] = dataclasses.field(default_factory=list)
    """Rows that cannot be used, and what is said of them."""

    def look_at(self, example: Example) -> None:
        """At its text, whatever becomes of it."""
        names: set[str] = set()
        for text in example.texts():
            self.num_bytes += len(text.encode())
            if "{{" in text:
                names.update(_PLACEHOLDER.findall(text))
        for name in sorted(names):
            self.counts.add(PLACEHOLDER % name, example.source)

    def skip(self, example: Skipped) -> None:
        self.counts.add((_LEFT_OUT if example.bad else _SKIPPED).format(example.reason), example.source)
        if example.bad:
            self.bad.append((example, ""))

    def refuse(self, source: str, error: BadRowError) -> None:
        self.counts.add(_LEFT_OUT.format(error.reason), source)
        self.bad.append((Skipped(source, error.reason, bad=True), f"{source}: {error}"))


def encode_all(
    examples: Iterable[Example],
    encoder: Encoder,
    tokenizer: TextTokenizer,
    documents: Documents,
    *,
    bad: BadRows,
    tell: Callable[[str], None],
    size: int | None = None,
) -> Counts:
    """Fill `documents`, in the order of `examples`, on all cores.

    `tokenizer` is what the encoder loads; `bad` says what becomes of a row that cannot be used; `tell` hears how far it
    is, often; `size`: bytes of text in all, about. Raises DataError with all that is wrong.
    """
    counts, meter = Counts(), _Meter(size)
    for encoded in _encoded(_chunks(_of_one_shape(examples)), encoder, tokenizer):
        counts.update(encoded.counts)
        for skipped, text in encoded.bad:
            bad.count(skipped, text)
        bad.num_good += encoded.num_good
        documents.add(encoded.codes, encoded.lengths, encoded.shares, encoded.labels)
        tell(meter.line(encoded))
    bad.check()
    documents.flush()
    return counts


@dataclasses.dataclass(slots=True)
class _Meter:
    size: int | None
    num_examples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def line(self, encoded: Encoded) -> str:
        self.num_examples += encoded.num_examples
        self.num_tokens += len(encoded.codes)
        self.num_bytes += encoded.num_bytes
        took = max(1e-3, time.monotonic() - self.began)
        text = f"tokenising: {self.num_examples:,} documents, {self.num_tokens / 1e6:,.1f} M tokens, " \
               f"{self.num_tokens / took / 1e3:,.0f} k tokens/s"  # fmt: skip
        if self.size and self.num_bytes:
            share = min(1.0, self.num_bytes / self.size)
            text += f"; about {share:.0%} done, {_time(took / share - took)} left"
        return text


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _of_one_shape(examples: Iterable[Example]) -> Iterator[Example]:
    """Raises DataError."""
    shape: type[Example] | None = None
    for example in examples:
        if not isinstance(example, Skipped):
            shape = shape or type(example)
            if type(example) is not shape:
                raise DataError(f"{example.source}: {type(example).__name__.lower()} among rows of "
                                f"{shape.__name__.lower()}; make all rows of one kind")  # fmt: skip
        yield example


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Of about as much text each."""
    chunk: list[Example] = []
    chars = 0
    for example in examples:
        chunk.append(example)
        chars += 64 + sum(map(len, example.texts()))
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _encoded(chunks: Iterator[list[Example]], encoder: Encoder, tokenizer: TextTokenizer) -> Iterator[Encoded]:
    num_processes = min(MOST_PROCESSES, num_cores())
    head = list(islice(chunks, SMALL_CHARS // CHUNK_CHARS))
    further = next(chunks, None) if num_processes > 1 else None
    if further is None:
        yield from (encoder.encode(chunk, tokenizer) for chunk in chain(head, chunks))
        return
    # Fresh processes: forks of this one would have its locks, and its tokenizer's threads would be missing.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=(encoder,))
    except OSError as error:  # their semaphores are files there
        raise DataError(f"dataset: no processes that tokenise can be started: {error.strerror}; look at /dev/shm (df "
                        f"/dev/shm; a container's --shm-size), or do with one process, as in taskset -c 0 "
                        f"dtrain") from error  # fmt: skip
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chain(head, [further], chunks):
            with _others_not_told():
                waiting.append(pool.submit(_encode, chunk))  # may start a process
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("dataset: a process that tokenises was ended from outside, as happens where memory runs out; "
                        "free some, or give it fewer cores, as in taskset -c 0-3 dtrain") from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _others_not_told() -> Iterator[None]:
    """A process that is started meanwhile is not ended by a signal that is for this one, even as it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_PARENT)
    try:
        resource_tracker.ensure_running()  # started with the first of them: that lets SIGINT through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_PARENT)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_FOR_PARENT = (signal.SIGINT, signal.SIGUSR1)
"""A terminal's and Slurm's, which go to all processes."""
_here: list[tuple[Encoder, TextTokenizer]] = []
"""Of a process that encodes for another: what it was given at its start."""


def _begin(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is there already
    for signum in _FOR_PARENT:
        signal.signal(signum, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _here[:] = [(encoder, encoder.load())]


def _encode(chunk: list[Example]) -> Encoded:
    ((encoder, tokenizer),) = _here
    return encoder.encode(chunk, tokenizer)


def _fit(row: Row, limit: Limit, source: str, counts: Counts) -> list[Row]:
    """The pieces of a document that fit into a row. Raises BadRowError where that is what to do with a long one."""
    firsts = np.cumsum(row.lengths) - row.lengths
    assert not row.targets[firsts].any(), "the first token is never a target: nothing comes before it"
    num, most = len(row.tokens), limit.max_length
    if num <= most:
        return [row]
    if limit.on_long == "error":
        raise BadRowError(f"{num} tokens, over dataset.max_length={most}; raise it, or set dataset.on_long to split, "
                          f"truncate or drop")  # fmt: skip
    if limit.on_long == "drop":
        counts.add(f"left out: over {most} tokens", source)
        return []
    if len(row.lengths) > 1:
        return _cut_alike(row, limit, source, counts)
    if limit.on_long == "truncate":
        return _truncated(row, limit, source, counts)
    assert limit.on_long == "split", limit.on_long
    counts.add(f"split at {most} tokens", source)
    return [_piece(row, start, min(start + most, num)) for start in range(0, num, most)]


def _truncated(row: Row, limit: Limit, source: str, counts: Counts) -> list[Row]:
    num, most = len(row.tokens), limit.max_length
    counts.add(f"truncated to {most} tokens", source)
    counts.add(CUT_OFF, source, num - most)
    if limit.keeps_targets:
        return _without_the_middle(row, num - most, counts, source)
    if row.targets[1:].all():  # of a text, all is learned: there is nothing more to say
        return [_piece(row, 0, most)]
    if row.targets[most:].any():
        counts.add(CUT_OFF_LEARNED, source, int(row.targets[most:].sum()))
    if row.targets[most - 1 : most + 1].all():
        counts.add("cut within what is learned", source)
    return [_piece(row, 0, most)]


def _without_the_middle(row: Row, surplus: int, counts: Counts, source: str) -> list[Row]:
    last = int(np.argmax(row.targets)) - 1
    if last < surplus:
        counts.add("left out: what is learned of it is longer than a row", source)
        return []
    keep = np.ones(len(row.tokens), np.bool_)
    keep[last - surplus : last] = False
    return [Row(row.tokens[keep], row.targets[keep], np.array([keep.sum()], np.int32), row.labels)]


def _piece(row: Row, start: int, end: int) -> Row:
    targets = row.targets[start:end].copy()
    targets[0] = False
    return Row(row.tokens[start:end], targets, np.array([end - start], np.int32), row.labels)


def _cut_alike(row: Row, limit: Limit, source: str, counts: Counts) -> list[Row]:
    """Documents that must stay together, cut to one length, the longest that leaves room for all; none where one would
    be left without what is learned of it. Raises BadRowError where they are to be split.
    """
    most, lengths = limit.max_length, row.lengths.tolist()
    if limit.on_long == "split":
        raise BadRowError(f"{sum(lengths)} tokens in {len(lengths)} documents that belong together, over "
                          f"dataset.max_length={most}; these cannot be split: raise it, or set dataset.on_long to "
                          f"truncate or drop")  # fmt: skip
    longest = max(n for n in range(1, most + 1) if sum(min(length, n) for length in lengths) <= most) \
        if len(lengths) <= most else 0  # fmt: skip
    starts = np.cumsum(row.lengths) - row.lengths
    kept = [slice(start, start + min(length, longest)) for start, length in zip(starts.tolist(), lengths, strict=True)]
    if not all(row.targets[part].any() for part in kept):
        counts.add(f"left out: what comes before the replies takes all of {most} tokens", source)
        return []
    counts.add(f"truncated together to {most} tokens", source)
    counts.add(CUT_OFF, source, sum(lengths) - sum(part.stop - part.start for part in kept))
    tokens, targets = (np.concatenate([array[part] for part in kept]) for array in (row.tokens, row.targets))
    if lost := int(row.targets.sum()) - int(targets.sum()):
        counts.add(CUT_OFF_LEARNED, source, lost)
    return [Row(tokens, targets, np.array([part.stop - part.start for part in kept], np.int32), row.labels)]


def share(example: Example, seed: int) -> float:
    """A number in [0, 1) that only the example's text and the seed decide; what is held out goes by it."""
    state = xxhash.xxh3_64(seed=seed % 2**64)
    for text in example.texts():
        state.update(text.encode())
        state.update(b"\0")
    return state.intdigest() / 2**64
