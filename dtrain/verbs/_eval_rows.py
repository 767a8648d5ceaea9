"""The rows that `dtrain eval` looks at: of data that is typed, read as the run reads its own, or its held-out ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

from dtrain.config.compose import compose, load_yaml
from dtrain.config.spec import AbstractSpec, DatasetSpec, ModelSpec, ObjectiveSpec, TemplateSpec
from dtrain.config.validate import not_allowed, validate_spec
from dtrain.data.tokenizer import FILES as TOKENIZER_FILES
from dtrain.datasets.base import Labelled, Skipped
from dtrain.errors import ConfigError, RunError
from dtrain.folders import whole_folder
from dtrain.plan.plan import AUTO_BATCH
from dtrain.verbs._model import Named, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dtrain.data.rows import Row
    from dtrain.data.store import RowStore
    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures
    from dtrain.runs import RunDir

_GROUPS = ("dataset", "objective", "template")
_KEPT = ("max_length", "packing", "on_long")
"""Of the run's dataset, whatever the other one is."""


class Source(NamedTuple):
    name: str
    store: RowStore
    num_rows: int
    """The first so many are looked at."""
    pad_id: int
    objective: ObjectiveSpec
    dataset: DatasetSpec | None
    """Where the rows come from; None for rows of a run, of which only tokens are kept."""
    global_batch: int
    """Rows that a loss may look at together: as many as the run's own."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        return ((i, self.store.row(i)) for i in range(self.num_rows))


@final
@dataclasses.dataclass(frozen=True)
class _Ready(ModelSpec):
    """A model whose folder is there: its tokenizer is the one to use, whatever it was made of."""

    folder: Path

    def trained(self) -> bool:
        return True

    def figures(self) -> Figures:
        raise NotImplementedError

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        return self.folder

    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        raise NotImplementedError


def find(named: Named, overrides: Sequence[str], files: Sequence[str], *, plugins: Sequence[str],
         most: int | None) -> list[Source]:  # fmt: skip
    """`files`: each is a source by itself; `most`: rows of each. Raises ConfigError, DataError, RunError."""
    _check(overrides)
    config = None if named.run is None else settled(named.run)
    typed = _typed(overrides)
    if not files and not any(key.partition(".")[0] == "dataset" for key in typed):
        return _held_out(named, config, typed, plugins, most)
    found = []
    every: Sequence[str | None] = files or [None]
    for file in every:
        more = [] if file is None else [f"dataset.path={file}"]
        specs = _specs([*overrides, *more], config, plugins)
        for name, part in _parts(file, specs.dataset).items():
            found.append(_prepared(named, specs, name, part, most))
    return found


class _Specs(NamedTuple):
    dataset: DatasetSpec
    objective: ObjectiveSpec
    template: TemplateSpec
    seed: int
    global_batch: int


def _batch(config: Mapping[str, Any] | None) -> int:
    said = None if config is None else config["batch"]["global_batch"]
    return said if isinstance(said, int) else AUTO_BATCH


def settled(run: RunDir) -> Mapping[str, Any]:
    """What it was trained with, as plain data: files that are gone since are not asked for. Raises ConfigError."""
    plain = load_yaml(run.config)
    if not isinstance(plain, dict):
        raise ConfigError(f"{run.config}: not a configuration")
    return plain


def _check(overrides: Sequence[str]) -> None:
    problems = [f"{text}: not for `dtrain eval`, which takes keys of {', '.join(_GROUPS)}; what a run was trained with "
                f"cannot be changed" for text in overrides if _key(text).partition(".")[0] not in _GROUPS]  # fmt: skip
    if problems:
        raise ConfigError.of(problems)


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _typed(overrides: Sequence[str]) -> list[str]:
    return [_key(text) for text in overrides]


def _specs(overrides: Sequence[str], config: Mapping[str, Any] | None, plugins: Sequence[str]) -> _Specs:
    """The run's, with what was typed in their place. Raises ConfigError with all problems."""
    composed = compose(overrides)
    problems = list(composed.problems)
    found: dict[str, AbstractSpec] = {}
    for group in _GROUPS:
        now: dict[str, Any] = composed.values[group]
        entry = now if config is None else _over(config[group], now, group, _typed(overrides))
        if entry.get("streaming"):  # the same rows; all of them are looked at here, from a file
            entry = {**entry, "streaming": False}
        try:
            found[group] = validate_spec(group, entry, plugins=plugins)
            problems += not_allowed(found[group], plugins, "--plugin {}")
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError.of(problems)
    seed = 0 if config is None else config["run"]["seed"]
    return _Specs(cast(DatasetSpec, found["dataset"]), cast(ObjectiveSpec, found["objective"]),
                  cast(TemplateSpec, found["template"]).settled(), seed, _batch(config))  # fmt: skip


def _over(own: Mapping[str, Any], now: Mapping[str, Any], group: str, typed: Sequence[str]) -> dict[str, Any]:
    """What of `now` was typed, over the run's own; another choice takes its place but for a few keys."""
    keys = {key.split(".")[1] for key in typed if key.startswith(f"{group}.")}
    chosen = group in typed or (group == "dataset" and bool({"path", "sources"} & keys))
    if chosen and now["_target_"] != own["_target_"]:
        kept = {key: own[key] for key in _KEPT if group == "dataset" and key in own and key not in keys}
        return {**now, **kept}
    return {**own, **{key: now[key] for key in keys if key in now}}


def _parts(file: str | None, dataset: DatasetSpec) -> Mapping[str, DatasetSpec]:
    """By name: of a mixture each of its datasets."""
    parts = dataset.parts()
    if parts is not None:
        return parts.datasets
    path = getattr(dataset, "path", None)
    return {file or (path if isinstance(path, str) else type(dataset).__name__.lower()): dataset}


def _prepared(named: Named, specs: _Specs, name: str, dataset: DatasetSpec, most: int | None) -> Source:
    from dtrain.data.prepare import prepare
    from dtrain.data.prepared import FILES
    from dtrain.data.store import RowStore

    data = named.run.read_manifest().get("data") if named.run is not None else None
    cache = (Path(data["dir"]).parent if isinstance(data, dict) else Path("runs") / ".cache").absolute()
    if isinstance(next((one for one in dataset.examples() if not isinstance(one, Skipped)), None), Labelled):
        dataset = dataclasses.replace(cast(Any, dataset), packing=False)  # a text a row: each is told of by itself
    ready = prepare(dataset, specs.objective, _Ready(_with_config(named, cache)), specs.template, seed=specs.seed,
                    eval_fraction=0, cache=cache, say=say)  # fmt: skip
    for line in ready.lines():
        say(line)
    store = RowStore(ready.dir / FILES[0])
    return Source(name, store, min(len(store), most or len(store)), ready.pad_id, ready.objective, dataset,
                  specs.global_batch)  # fmt: skip


def _with_config(named: Named, cache: Path) -> Path:
    """A folder with tokenizer and configuration: of an adapter, one in the cache with links to both."""
    if named.base is None:
        return named.folder
    where = f"{named.folder.resolve()}\0{named.base.resolve()}"
    target = cache / f"adapter-{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        with whole_folder(target) as making:
            (making / "config.json").symlink_to((named.base / "config.json").resolve())
            for name in TOKENIZER_FILES:
                if (named.folder / name).is_file():
                    (making / name).symlink_to((named.folder / name).resolve())
    return target


def _held_out(named: Named, config: Mapping[str, Any] | None, typed: Sequence[str], plugins: Sequence[str],
              most: int | None) -> list[Source]:  # fmt: skip
    from dtrain.data.prepared import FILES, read_prepared

    if named.run is None or config is None:
        raise ConfigError(f"{named.folder}: what it is to be evaluated on was not said; type --data FILE, or "
                          f"dataset.path=FILE")  # fmt: skip
    if typed:
        raise ConfigError(f"{', '.join(typed)}: without data; the run's held-out rows are as they were prepared; type "
                          f"--data FILE too")  # fmt: skip
    data = named.run.read_manifest().get("data")
    if not isinstance(data, dict):
        raise RunError(f"{named.run.path}: does not say where its rows are; type --data FILE")
    objective = cast(ObjectiveSpec, validate_spec("objective", config["objective"], plugins=plugins))
    ready = read_prepared(Path(data["dir"]), Path(data["assets"]), objective)
    held = ready.rows(FILES[1])
    if not len(held):
        raise RunError(f"{named.run.path}: no rows are held out (eval.fraction); type --data FILE")
    limit = most or config["eval"]["max_rows"] or len(held)
    chosen, first = held.first(limit), 0
    fewer = most is None and len(chosen) < len(held)
    say(f"data: {len(chosen):,} of the {len(held):,} rows that the run holds out"
        + f", as in its own evals (eval.max_rows={limit}); --rows says otherwise" * fewer)  # fmt: skip
    found = []
    for name, store in held.sources.items():
        mine = int(((chosen >= first) & (chosen < first + len(store))).sum())
        first += len(store)
        title = "held out" if len(held.sources) == 1 else name
        found.append(Source(title, store, mine, ready.pad_id, ready.objective, None, _batch(config)))
    return found
