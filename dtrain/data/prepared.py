"""Rows that are ready to train on: what a user and the ranks should know of them."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dtrain.config.spec import DatasetSpec, ObjectiveSpec, OnDry
from dtrain.data.counts import Counts
from dtrain.datasets.base import SHAPES
from dtrain.errors import DataError

if TYPE_CHECKING:
    from dtrain.data.store import AbstractStore
    from dtrain.data.streaming import Streams
    from dtrain.plan.batch import BatchPlan

FILES = ("train.arrow", "eval.arrow")
META = "meta.json"
_POLL_S, _SAY_EVERY_S = 0.2, 10.0
_PADDING_STEPS = 100
_ENDS = {
    "stop": "the first source has been seen whole",
    "repeat": "the last source has been seen whole; the others start again",
    "drop": "every row has been seen once",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One dataset of a mixture."""

    name: str
    dir: str
    """Its prepared rows, beside the mixture's folder."""
    weight: float
    rate: float
    """Rows of it for each of the mixture, up to a common factor."""
    num_rows: int
    num_tokens: int
    num_epoch_rows: int
    """Rows of it in an epoch of the mixture."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was settled of a stream before it runs, by looking at its beginning."""

    shards: int
    asked_shards: int
    """What the configuration says."""
    held_below: float
    """The share of a document below which it is held out."""
    shape: str
    """Of its examples."""
    content: str
    """The dataset's digest."""
    whole: bool
    """Whether its beginning was all of it."""
    num_examples: int
    """In the beginning, and how many of these are held out."""
    num_held: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Of a stream, what its beginning says of it: rows, tokens and counts are of that."""

    dir: Path
    """A folder with `FILES` and `META`; of a mixture with `META` only, of a stream without rows to train on."""
    assets: Path
    """The model's folder: config, tokenizer with the chat template of the run."""
    objective: ObjectiveSpec
    """What `auto` came to."""
    pad_id: int
    max_length: int
    num_rows: int
    """In an epoch; so are the tokens and targets."""
    num_tokens: int
    num_targets: int
    num_eval_rows: int
    num_documents: int
    """Documents, or pieces of long ones, in all rows."""
    fill: float
    """Share of the tokens of full-length rows that is not padding."""
    counts: dict[str, int]
    """What became of the examples, by reason."""
    by_source: dict[str, dict[str, int]]
    """The same of each file, or whatever else the examples come from."""
    first: dict[str, list[str]]
    """Where the first of each reason are, as `file:line`."""
    notes: list[str]
    """What a user should know of how they were read: the chat template, and what of a row is learned."""
    digest: str
    """Of the rows themselves: equal where training would see the same, wherever the files lay."""
    most_fill: float | None = None
    """What no packing of these documents is above; None where that was not worked out."""
    settled: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the objective whose values were found in the data."""
    sources: tuple[Source, ...] = ()
    """Of a mixture."""
    on_dry: OnDry | None = None
    streams: Mapping[str, Facts] = dataclasses.field(default_factory=dict)
    """Of what is streamed, by the names of the sources, or `all`."""

    @property
    def num_epoch_rows(self) -> int | None:
        """Rows of an epoch; None where nobody has counted them."""
        return None if any(not facts.whole for facts in self.streams.values()) else self.num_rows

    def lines(self) -> list[str]:
        """What a user should know of it."""
        counts = Counts(self.counts, self.by_source, self.first)
        documents = [f"data: {line}" for line in counts.lines()]
        if self.streams:
            return [*self.notes, *self._of_streams(), *documents]
        if self.sources:
            return [*self.notes, *self._of_mixture(), *documents]
        most = "" if self.most_fill is None else f" (at best {self.most_fill:.1%})"
        first = (f"data: {self.num_rows:,} rows of up to {self.max_length:,} tokens, {self.fill:.1%} full{most}; "
                 f"{self._tokens()}; {self.num_eval_rows:,} rows held out")  # fmt: skip
        return [*self.notes, first, *documents]

    def _tokens(self) -> str:
        """Where a target is a text or a pair, no token is one."""
        targets = f", {self.num_targets:,} of them targets" if self.objective.learns_tokens else ""
        return f"{self.num_tokens:,} tokens{targets}"

    def padding(self, batch: BatchPlan, seed: int) -> str:
        """How much of what the ranks compute is padding, in words; empty where rows are packed."""
        from dtrain.data.places import padding

        if self.streams:
            return ""
        store = self.rows(FILES[0])
        if store.packed:
            return ""
        steps = max(1, min(_PADDING_STEPS, self.num_rows // batch.global_batch))
        grouped = padding(store, store.order(seed), batch, steps=steps)
        return (f"data: {grouped:.1%} of what the ranks compute is padding, with rows of like length together; packed "
                f"to {self.max_length:,} tokens nearly none would be")  # fmt: skip

    def train_rows(self, dataset: DatasetSpec, seed: int) -> AbstractStore | Streams:
        """Opened; of `dataset`, which was prepared with this seed. Raises DataError."""
        if self.streams:
            from dtrain.data.streaming import open_streams

            return open_streams(self, dataset, seed)
        return self.rows(FILES[0])

    def rows(self, name: str) -> AbstractStore:
        """Of `FILES`, opened; of a stream only those that are held out."""
        from dtrain.data.store import MixedStore, RowStore

        if not self.sources:
            return RowStore(self.dir / name)
        assert self.on_dry is not None
        stores = {source.name: RowStore(self.dir.parent / source.dir / name) for source in self.sources}
        return MixedStore(stores, {source.name: source.rate for source in self.sources}, self.on_dry)

    def _of_streams(self) -> list[str]:
        lines = []
        weights = {source.name: source.weight for source in self.sources}
        for name, facts in self.streams.items():
            named = f"{name}: " if self.sources else ""
            share = f", {weights[name] / sum(weights.values()):.1%} of the tokens" if self.sources else ""
            fewer = ""
            if facts.shards < facts.asked_shards:
                fewer = f" instead of {facts.asked_shards:,}, as there are only {facts.num_examples:,} documents"
            shards = f"{facts.shards:,} shard{'s' * (facts.shards > 1)}{fewer}"
            lines.append(
                f"data: {named}a stream in {shards}{share}; one that is through begins again, in another order"
            )
            lines.append(f"data: {named}{facts.num_held:,} of the first {facts.num_examples:,} documents are held out "
                         f"for evals; others like them are left out of the training wherever they come")  # fmt: skip
        tried = "some rows of it" if self.num_epoch_rows is None else "a pass"
        return [*lines, f"data: {tried}: {self.num_rows:,} rows of up to {self.max_length:,} tokens, "
                        f"{self.fill:.1%} full; {self._tokens()}; {self.num_eval_rows:,} rows held out"]  # fmt: skip

    def _of_mixture(self) -> list[str]:
        total = sum(source.weight for source in self.sources)
        lines = [f"data: a mixture of {len(self.sources)} sources by tokens; an epoch is {self.num_rows:,} rows, "
                 f"{self.num_tokens:,} tokens: until {_ENDS[self.on_dry or 'stop']} (on_dry={self.on_dry}); "
                 f"{self.num_eval_rows:,} rows held out"]  # fmt: skip
        return [*lines, *(
            f"data:   {source.name}: weight {source.weight:g}, {source.weight / total:.1%} of the tokens"
            f"{' until it is out' * (self.on_dry == 'drop')}; {source.num_rows:,} rows, "
            f"{source.num_epoch_rows / source.num_rows:.2f} passes in an epoch"
            for source in self.sources
        )]  # fmt: skip


def read_prepared(
    folder: Path, assets: Path, objective: ObjectiveSpec, *, wait_s: float = 0, say: Callable[[str], None] = print
) -> Prepared:
    """What `prepare` made in `folder`, from the same objective. Waits so long for another machine's files to be seen;
    raises DataError where they are not.
    """
    deadline, told = time.monotonic() + wait_s, -_SAY_EVERY_S
    while (problem := problem_of(folder)) is not None:
        if time.monotonic() >= deadline:
            raise DataError(f"{folder}: not seen whole on {platform.node()}{f' after {wait_s:g} s' * bool(wait_s)}: "
                            f"{problem or 'there is no such folder'}; run.cache must be on a file system that all "
                            f"nodes share")  # fmt: skip
        if time.monotonic() - told >= _SAY_EVERY_S:
            told = time.monotonic()
            say(f"data: waiting for {folder} to be seen on {platform.node()}: {problem or 'no such folder yet'}")
        time.sleep(_POLL_S)
    meta = json.loads((folder / META).read_bytes())
    values: dict[str, Any] = dict(meta["prepared"])
    values["sources"] = tuple(Source(**source) for source in values.get("sources", ()))
    values["streams"] = {name: Facts(**facts) for name, facts in values.get("streams", {}).items()}
    objective = objective.among([SHAPES[shape] for shape in meta["shapes"]])
    if settled := values.get("settled"):
        objective = dataclasses.replace(cast("Any", objective), **settled)
    return Prepared(dir=folder, assets=assets, objective=objective, **values)


def problem_of(folder: Path) -> str | None:
    """Why the rows in `folder` cannot be used; empty where there are none yet."""
    try:
        meta = json.loads((folder / META).read_bytes())
        for name, expected in meta["bytes"].items():
            found = (folder / name).stat().st_size
            if found != expected:
                return f"{name} there has {found} bytes instead of {expected}"
        for source in meta["prepared"].get("sources", ()):
            if (problem := problem_of(folder.parent / source["dir"])) is not None:
                return problem or f"{folder.parent / source['dir']} is missing"
    except FileNotFoundError as error:
        return f"{error.filename} is missing" if folder.is_dir() else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json there is damaged: {error!r}"
    return None
