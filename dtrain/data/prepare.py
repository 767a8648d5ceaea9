"""From a dataset to rows on disk, once; every later start finds them again. Runs in the parent, without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from dtrain.config.spec import AbstractSpec, DatasetSpec, ModelSpec, ObjectiveSpec, Parts, TemplateSpec
from dtrain.data.counts import Counts
from dtrain.data.once import alone, remove_locks
from dtrain.data.prepared import META, Source, problem_of
from dtrain.data.prepared import Prepared as Prepared
from dtrain.data.prepared import read_prepared as read_prepared
from dtrain.data.template import describe, with_template
from dtrain.data.tokenizer import tokenizer_digest
from dtrain.datasets.base import SHAPES
from dtrain.errors import DataError
from dtrain.folders import discard, remove_leftovers, whole_folder
from dtrain.models.outputs import with_outputs

_VERSION = 5
"""Of the files in a folder of prepared data; another version is never read, but made anew."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OF_STREAMS = ("streaming", "stream_shards", "stream_buffer")
"""Keys of datasets on which rows depend that are streamed, and no others."""
_SAY_EVERY_S = 10.0
_COMPARED = 50
Say = Callable[[str], None]


def prepare(  # noqa: PLR0913 - what the rows depend on
    dataset: DatasetSpec,
    objective: ObjectiveSpec,
    model: ModelSpec,
    template: TemplateSpec,
    *,
    eval_fraction: float,
    seed: int,
    cache: Path,
    say: Say,
) -> Prepared:
    """The rows for these settings: those of an earlier call where nothing changed, else made now.

    Any number of processes may do this at once: one makes the rows, the others wait. Raises DataError, ModelError.
    """
    try:
        for note in dataset.notes():
            say(f"data: {note}")
        model_folder = _model_folder(model, dataset, cache, say)
        job = _Job(objective, template, model_folder, with_template(model_folder, template, cache), eval_fraction, seed,
                   cache, say)  # fmt: skip
        parts = dataset.parts()
        found = job.one(dataset) if parts is None else job.mixture(dataset, parts)
        return dataclasses.replace(
            found, assets=with_outputs(found.assets, found.objective.outputs(), found.pad_id, cache)
        )
    except OSError as error:
        if error.errno in _FULL or (error.filename and _along(Path(error.filename), cache)):
            raise DataError(f"run.cache={cache}: {error}; choose a folder with room that can be written") from error
        raise


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """What the rows of all datasets of a run depend on."""

    objective: ObjectiveSpec
    template: TemplateSpec
    model_folder: Path
    assets: Path
    eval_fraction: float
    seed: int
    cache: Path
    say: Say

    def one(self, dataset: DatasetSpec, label: str = "") -> Prepared:
        """Of one dataset that is no mixture; `label` stands before what is said."""
        parts = self._parts(dataset)
        kind = "stream" if dataset.streaming else "data"
        final = self.cache / f"{kind}-{_key(parts)}"

        def say(line: str) -> None:
            self.say(f"data: {label}{line}")

        if problem_of(final) is None:
            say(f"reusing {final}: nothing that the rows depend on has changed")
            return read_prepared(final, self.assets, self.objective)
        remove_locks(self.cache)
        with alone(self.cache / f".{final.name}.lock", final.name, say) as tell:
            problem = problem_of(final)
            if problem is None:
                say(f"reusing {final}: another launch has just made it")
                return read_prepared(final, self.assets, self.objective)
            remove_leftovers(self.cache)
            if problem:
                discard(final)
            say(f"preparing {final}: {problem or _what_changed(parts, self.cache, kind)}")
            self._build(final, dataset, parts, tell, say)
        return read_prepared(final, self.assets, self.objective)

    def _build(self, final: Path, dataset: DatasetSpec, parts: dict[str, Any], tell: Say, say: Say) -> None:
        from dtrain.data.build import build
        from dtrain.data.head import look

        about = partial(describe, self.model_folder, self.assets, self.template)
        told = time.monotonic()

        def both(line: str) -> None:
            nonlocal told
            tell(line)
            if time.monotonic() - told >= _SAY_EVERY_S:
                told = time.monotonic()
                say(line)

        with whole_folder(final) as folder:
            (look if dataset.streaming else build)(folder, dataset, self.objective, self.assets, about, parts, both)

    def mixture(self, dataset: DatasetSpec, parts: Parts) -> Prepared:
        """Of each of its datasets by itself, and a folder that names them all."""
        from dtrain.data.build import write_meta
        from dtrain.data.head import facts_of

        made: dict[str, Prepared] = {}
        for name, one in parts.datasets.items():
            try:
                made[name] = self.one(one, f"{name}: ")
            except DataError as error:
                raise DataError(f"dataset.sources.{name}: {error}") from error
        sources = _sources(made, parts, None if dataset.streaming else self.seed)
        summed = _summed(made, sources, parts, dataset.max_length)
        if dataset.streaming:
            summed["streams"] = facts_of(made)
        key = {"version": _VERSION, "rows": {name: one.dir.name for name, one in made.items()},
               "weights": dict(parts.weights), "on_dry": parts.on_dry, "run.seed": self.seed}  # fmt: skip
        final = self.cache / f"mixture-{_key(key)}"
        if (problem := problem_of(final)) is not None:
            if problem:
                discard(final)
            shapes = list(dict.fromkeys(shape for one in made.values() for shape in _shapes(one)))
            self.objective.among([SHAPES[shape] for shape in shapes])
            with whole_folder(final) as folder:
                write_meta(folder, parts=key, shapes=shapes, sizes={}, prepared=summed)
        return read_prepared(final, self.assets, self.objective)

    def _parts(self, dataset: DatasetSpec) -> dict[str, Any]:
        """All that the rows depend on, by the names that a user knows."""
        return {
            "version": _VERSION,
            **_values("dataset", dataset),
            "content of the dataset": dataset.digest(),
            "tokenizer": tokenizer_digest(self.model_folder),
            "template.name": self.template.name,
            "text of the template": [self.template.text, self.template.ends],
            **_values("objective", self.objective, but=self.objective.of_loss),
            "eval.fraction": self.eval_fraction,
            "run.seed": self.seed,
        }


def _sources(made: Mapping[str, Prepared], parts: Parts, seed: int | None) -> list[Source]:
    """How many rows of each are taken for what its weight says in tokens; of streams, which have no `seed`, an epoch
    is as long as what was looked at. Raises DataError.
    """
    from dtrain.data.order import Mixed

    rates = {name: parts.weights[name] * one.num_rows / one.num_tokens for name, one in made.items()}
    num_rows = [one.num_rows for one in made.values()]
    counts = num_rows if seed is None else Mixed(seed, num_rows, list(rates.values()), parts.on_dry).counts
    for (name, one), num in zip(made.items(), counts, strict=True):
        if not num:
            raise DataError(f"dataset.sources.{name}: with dataset.on_dry={parts.on_dry} none of its {one.num_rows:,} "
                            f"rows would ever be seen: another source is seen whole before; use on_dry=repeat or drop, "
                            f"or another weight")  # fmt: skip
    return [Source(name=name, dir=one.dir.name, weight=parts.weights[name], rate=rates[name], num_rows=one.num_rows,
                   num_tokens=one.num_tokens, num_epoch_rows=num)
            for (name, one), num in zip(made.items(), counts, strict=True)]  # fmt: skip


def _summed(made: Mapping[str, Prepared], sources: list[Source], parts: Parts, max_length: int) -> dict[str, Any]:
    """What `Prepared` says of a mixture; tokens and targets of an epoch follow from the means of the sources."""
    import xxhash

    counts = Counts()
    for name, one in made.items():
        counts.update(Counts(one.counts, {name: one.counts}, one.first))
    passes = {source.name: source.num_epoch_rows / source.num_rows for source in sources}
    num_rows = sum(source.num_epoch_rows for source in sources)
    num_tokens = round(sum(one.num_tokens * passes[name] for name, one in made.items()))
    said = [[name, one.digest, parts.weights[name]] for name, one in made.items()]
    return {
        "pad_id": next(iter(made.values())).pad_id,
        "max_length": max_length,
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "num_targets": round(sum(one.num_targets * passes[name] for name, one in made.items())),
        "num_eval_rows": sum(one.num_eval_rows for one in made.values()),
        "num_documents": sum(one.num_documents for one in made.values()),
        "fill": num_tokens / (num_rows * max_length),
        "counts": counts.reasons,
        "by_source": counts.sources,
        "first": counts.places,
        "notes": list(dict.fromkeys(note for one in made.values() for note in one.notes)),
        "digest": xxhash.xxh3_128_hexdigest(json.dumps([said, parts.on_dry]).encode()),
        "settled": _same_settled(made),
        "sources": [dataclasses.asdict(source) for source in sources],
        "on_dry": parts.on_dry,
    }


def _same_settled(made: Mapping[str, Prepared]) -> dict[str, Any]:
    """What was found in the data, which must be the same in each. Raises DataError."""
    found = [one.settled for one in made.values()]
    for key in found[0]:
        by_name = {name: one.settled.get(key) for name, one in made.items()}
        differ = [f"{name}: {value}" for name, value in by_name.items() if value != found[0][key]]
        if differ:
            raise DataError(f"objective.{key}: not the same in all sources ({found[0][key]}; {'; '.join(differ)}); "
                            f"name all that there are with objective.{key}=")  # fmt: skip
    return found[0]


def _model_folder(model: ModelSpec, dataset: DatasetSpec, cache: Path, say: Say) -> Path:
    """The model's files. Where they are made of the dataset's text, it is read once, not at every start."""
    from dtrain import __version__

    asked = False

    def texts() -> Iterator[str]:
        nonlocal asked
        asked = True
        return _texts(dataset)

    key = _key(
        {"dtrain": __version__, **_values("model", model), **_values("dataset", dataset), "of": dataset.digest()}
    )
    note = cache / f"model-{key}.json"
    with contextlib.suppress(OSError, ValueError):
        folder = cache / str(json.loads(note.read_bytes()))
        if folder.is_dir():
            return folder
    with alone(cache / f".{note.name}.lock", "the model's files", lambda line: say(f"model: {line}")):
        folder = model.assets(texts, cache)
        if asked and folder.parent == cache:
            note.write_text(json.dumps(folder.name), encoding="utf-8")
    return folder


def _texts(dataset: DatasetSpec) -> Iterator[str]:
    from dtrain.data.head import beginning

    for example in beginning(dataset) if dataset.streaming else dataset.examples():
        yield from example.texts()


def _along(path: Path, cache: Path) -> bool:
    """Whether `path` is in the cache, or on the way to it."""
    return path == cache or cache in path.parents or path in cache.parents


def _values(name: str, spec: AbstractSpec, *, but: Collection[str] = ()) -> dict[str, Any]:
    fields = dataclasses.fields(cast("Any", spec))
    kind = f"{type(spec).__module__}.{type(spec).__qualname__}"
    unused = [*but, *(_OF_STREAMS if not getattr(spec, "streaming", True) else ())]
    names = [field.name for field in fields if field.name not in unused]
    return {name: kind, **{f"{name}.{each}": getattr(spec, each) for each in names}}


def _key(parts: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())[:16]


def _shapes(prepared: Prepared) -> list[str]:
    shapes: list[str] = json.loads((prepared.dir / META).read_bytes())["shapes"]
    return shapes


def _what_changed(parts: Mapping[str, Any], cache: Path, kind: str) -> str:
    """Against the data in the cache that is nearest, so that nobody has to guess why it is made anew."""
    now = json.loads(json.dumps(dict(parts), default=str))
    nearest: list[str] | None = None
    with contextlib.suppress(OSError):  # just removed by another process
        metas = sorted(cache.glob(f"{kind}-*/{META}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for meta in metas[:_COMPARED]:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged
                before = json.loads(meta.read_bytes())["parts"]
                # What only the one kind of dataset or objective has is said by the change of kind.
                both = [name for name in now if name in before]
                changed = [_change(name, before[name], now[name]) for name in both if before[name] != now[name]]
                nearest = changed if nearest is None or len(changed) < len(nearest) else nearest
    if nearest is None:
        return "nothing is prepared yet"
    return "; ".join(sorted(nearest, key=lambda line: line.endswith("changed")))


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("dataset", "objective"):
        was, is_ = (str(kind).rpartition(".")[2] for kind in (before, now))
        return f"{name} was {was}, is {is_}"
    return f"{name} was {before}, is {now}" if "." in name else f"{name} changed"
