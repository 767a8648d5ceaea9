"""From a dataset to rows on disk, once; every later start finds them again. Runs in the parent, without torch."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.config.spec import DatasetSpec, ModelSpec, ObjectiveSpec, OnLong, TemplateSpec
from dtrain.data.template import describe, with_template
from dtrain.data.tokenizer import TextTokenizer, tokenizer_digest
from dtrain.datasets.badrows import BadRows
from dtrain.datasets.base import SHAPES, Chat, Example, Judged, Preference, Skipped, Text
from dtrain.errors import DataError
from dtrain.folders import discard, remove_leftovers, whole_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dtrain.data.rows import Row

_VERSION = 2
"""Of the files in a folder of prepared data; another version is never read, but made anew."""
_FILES = ("train.arrow", "eval.arrow")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Rows that `RowStore` opens: `dir/train.arrow` and `dir/eval.arrow`."""

    dir: Path
    assets: Path
    """The model's folder: config, tokenizer with the chat template of the run."""
    objective: ObjectiveSpec
    """What `auto` came to."""
    pad_id: int
    max_length: int
    num_rows: int
    """To train on; so are the tokens and targets."""
    num_tokens: int
    num_targets: int
    num_eval_rows: int
    num_documents: int
    """Documents, or pieces of long ones, in all rows."""
    fill: float
    """Share of the tokens of full-length rows that is not padding."""
    counts: dict[str, int]
    """What became of the examples, by reason."""
    notes: list[str]
    """What a user should know of how they were read: the chat template, and what of a row is learned."""
    digest: str
    """Of the rows themselves: equal where training would see the same, wherever the files lay."""

    def lines(self) -> list[str]:
        """What a user should know of it."""
        first = (f"data: {self.num_rows:,} rows of up to {self.max_length:,} tokens, {self.fill:.1%} full; "
                 f"{self.num_tokens:,} tokens, {self.num_targets:,} of them targets; "
                 f"{self.num_eval_rows:,} rows held out")  # fmt: skip
        documents = "data: documents: " + ", ".join(f"{num:,} {reason}" for reason, num in self.counts.items())
        return [*self.notes, first, documents]


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

    Any number of processes may do this at once. Raises DataError, ModelError.
    """
    try:
        for note in dataset.notes():
            say(f"data: {note}")
        model_folder = model.assets(lambda: _texts(dataset), cache)
        assets = with_template(model_folder, template, cache)
        parts = _parts(dataset, objective, tokenizer_digest(model_folder), template, eval_fraction=eval_fraction,
                       seed=seed)  # fmt: skip
        final = cache / f"data-{_key(parts)}"
        problem = _problem(final)
        if problem is None:
            say(f"data: reusing {final}")
            return read_prepared(final, assets, objective)
        remove_leftovers(cache)
        if problem:
            discard(final)
        say(f"data: preparing {final}: {problem or _what_changed(parts, cache)}")
        with whole_folder(final) as folder:
            tokenizer = TextTokenizer.load(assets)
            about = partial(describe, model_folder, assets, template, tokenizer)
            _build(folder, dataset, objective, tokenizer, about, parts, say)
        return read_prepared(final, assets, objective)
    except OSError as error:
        if error.errno in _FULL or (error.filename and _along(Path(error.filename), cache)):
            raise DataError(f"run.cache={cache}: {error}; choose a folder with room that can be written") from error
        raise


def _along(path: Path, cache: Path) -> bool:
    """Whether `path` is in the cache, or on the way to it."""
    return path == cache or cache in path.parents or path in cache.parents


def read_prepared(folder: Path, assets: Path, objective: ObjectiveSpec) -> Prepared:
    """What `prepare` made in `folder`, from the same objective."""
    meta = json.loads((folder / "meta.json").read_bytes())
    resolved = objective.resolve(SHAPES[meta["shape"]])
    return Prepared(dir=folder, assets=assets, objective=resolved, **meta["prepared"])


def _texts(dataset: DatasetSpec) -> Iterator[str]:
    for example in dataset.examples():
        yield from example.texts()


def _parts(
    dataset: DatasetSpec,
    objective: ObjectiveSpec,
    tokenizer: str,
    template: TemplateSpec,
    *,
    eval_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """All that the rows depend on, by the names that a user knows."""
    return {
        "version": _VERSION,
        **_values("dataset", dataset),
        "content of the dataset": dataset.digest(),
        "tokenizer": tokenizer,
        "template.name": template.name,
        "text of the template": [template.text, template.ends],
        **_values("objective", objective),
        "eval.fraction": eval_fraction,
        "run.seed": seed,
    }


def _values(name: str, spec: DatasetSpec | ObjectiveSpec) -> dict[str, Any]:
    fields = dataclasses.fields(spec)  # type: ignore[arg-type]
    kind = f"{type(spec).__module__}.{type(spec).__qualname__}"
    return {name: kind, **{f"{name}.{field.name}": getattr(spec, field.name) for field in fields}}


def _key(parts: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())[:16]


def _problem(folder: Path) -> str | None:
    """Why the rows in `folder` cannot be used; empty where there are none yet."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name in _FILES:
            found, expected = (folder / name).stat().st_size, meta["bytes"][name]
            if found != expected:
                return f"{name} there has {found} bytes instead of {expected}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing" if folder.is_dir() else ""
    except (ValueError, KeyError, TypeError) as error:
        return f"meta.json there is damaged: {error!r}"
    return None


def _what_changed(parts: Mapping[str, Any], cache: Path) -> str:
    """Against the newest data in the cache, so that nobody has to guess why it is made anew."""
    try:
        metas = sorted(cache.glob("data-*/meta.json"), key=lambda path: path.stat().st_mtime)
        if not metas:
            return "nothing is prepared yet"
        before = json.loads(metas[-1].read_bytes())["parts"]
    except (ValueError, KeyError, OSError):  # damaged, or just removed by another process
        return "not prepared with these settings yet"
    now = json.loads(json.dumps(dict(parts), default=str))
    changed = [name for name in now if before.get(name) != now[name]]
    plain = [f"{name} was {before.get(name)}, is {now[name]}" for name in changed if "." in name]
    return "; ".join(plain + [f"{name} changed" for name in changed if "." not in name])


def _build(
    folder: Path,
    dataset: DatasetSpec,
    objective: ObjectiveSpec,
    tokenizer: TextTokenizer,
    about_template: Callable[..., list[str]],
    parts: dict[str, Any],
    say: Say,
) -> None:
    import numpy as np
    import xxhash

    from dtrain.data.encode import Limit, encode_all
    from dtrain.data.pack import one_each, pack
    from dtrain.data.store import write_rows

    examples = dataset.examples()
    shape, examples = _peek(examples)
    limit = Limit(dataset.max_length, _on_long(dataset, shape))
    resolved = objective.resolve(shape)
    documents = encode_all(
        examples, resolved, tokenizer, limit, bad=BadRows.of(dataset), seed=parts["run.seed"], say=say
    )
    if not documents.rows:
        raise _nothing(documents.counts)
    held = hold_out(documents.shares, parts["eval.fraction"])
    lengths = np.array([len(row.tokens) for row in documents.rows], np.int64)
    state = xxhash.xxh3_128()
    num_rows = {}
    for name, chosen in zip(_FILES, (np.flatnonzero(~held), np.flatnonzero(held)), strict=True):
        packing = pack(lengths[chosen], dataset.max_length) if dataset.packing else one_each(len(chosen))
        rows = (_join([documents.rows[i] for i in chosen[each]], state) for each in packing)
        write_rows(folder / name, rows, len(packing), packed=dataset.packing)
        state.update(f"{name} {len(packing)}".encode())
        num_rows[name] = len(packing)
    num_tokens = int(lengths[~held].sum())
    prepared = {
        "pad_id": tokenizer.pad_id,
        "max_length": dataset.max_length,
        "num_rows": num_rows["train.arrow"],
        "num_tokens": num_tokens,
        "num_targets": sum(row.num_targets for row, out in zip(documents.rows, held, strict=True) if not out),
        "num_eval_rows": num_rows["eval.arrow"],
        "num_documents": len(documents.rows),
        "fill": num_tokens / (num_rows["train.arrow"] * dataset.max_length),
        "counts": dict(documents.counts),
        "notes": [*about_template(used=issubclass(shape, Chat | Preference | Judged)), *resolved.notes(shape)],
        "digest": state.hexdigest(),
    }
    sizes = {name: (folder / name).stat().st_size for name in _FILES}
    meta = {"parts": parts, "shape": shape.__name__, "bytes": sizes, "prepared": prepared}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str) + "\n", encoding="utf-8")


def hold_out(shares: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """Which documents are for eval: those whose share is below `fraction`; at least one text, and never all.

    Equal texts stay on one side. Where all are equal, none is held out.
    """
    least, most = float(shares.min()), float(shares.max())
    held: NDArray[np.bool_] = shares < min(fraction, most)
    if fraction == 0 or least == most:
        held[:] = False
    elif not held.any():
        held[:] = shares == least
    return held


def _peek(examples: Iterator[Example]) -> tuple[type[Example], Iterator[Example]]:
    """The shape of the first example that is one, and all of them. Raises DataError where there is none."""
    seen: list[Example] = []
    for example in examples:
        seen.append(example)
        if not isinstance(example, Skipped):
            return type(example), chain(seen, examples)
    reasons = sorted({example.reason for example in seen if isinstance(example, Skipped)})
    raise DataError(f"dataset: no rows at all{'; skipped: ' + ', '.join(reasons) if reasons else ''}; "
                    f"look at what dataset.path names")  # fmt: skip


def _nothing(counts: Mapping[str, int]) -> DataError:
    stages = ", ".join(f"{num:,} {reason}" for reason, num in counts.items())
    return DataError(f"dataset: nothing left to train on: {stages}; add rows, or raise dataset.max_length")


def _join(rows: list[Row], state: Any) -> Row:
    """One packed row; its content goes into the digest `state`."""
    import numpy as np

    from dtrain.data.rows import Row

    if len(rows) == 1:
        row = rows[0]
    else:
        row = Row(*(np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "lengths")))
    for array in (row.lengths, row.tokens, row.targets):
        state.update(np.ascontiguousarray(array))
    return row


def _on_long(dataset: DatasetSpec, shape: type[Example]) -> OnLong:
    if dataset.on_long == "auto":
        return "split" if issubclass(shape, Text) else "truncate"
    return dataset.on_long
