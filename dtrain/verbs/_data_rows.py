"""What every `dtrain data` verb begins with: rows as `dtrain launch` would prepare them for the same overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dtrain.errors import UserError

if TYPE_CHECKING:
    from dtrain.config.spec import DatasetSpec
    from dtrain.data.prepare import Prepared
    from dtrain.data.rows import Row
    from dtrain.data.store import AbstractStore
    from dtrain.data.tokenizer import TextTokenizer

Part = Literal["train", "eval"]


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    prepared: Prepared
    notes: list[str]
    """How the rows came about: all that a launch would say of them."""
    dataset: DatasetSpec
    seed: int

    def samples(self, num: int) -> list[Row]:
        """Of a stream, the first of the training, in its order. Raises DataError."""
        from dtrain.data.streaming import Streams

        rows = self.prepared.train_rows(self.dataset, self.seed)
        assert isinstance(rows, Streams)
        return list(rows.samples(num))

    def store(self, part: Part) -> AbstractStore:
        """Of a mixture the rows of all its sources, each once."""
        return self.prepared.rows(f"{part}.arrow")

    def tokenizer(self) -> TextTokenizer:
        from dtrain.data.tokenizer import TextTokenizer

        return TextTokenizer.load(self.prepared.assets)


def open_rows(overrides: Sequence[str], config_dir: Path | None, say: Callable[[str], None]) -> Opened:
    """Prepare the rows, or find them. No plan is made: data can be looked at where the model does not fit.

    Raises ConfigError, ModelError, DataError.
    """
    from dtrain.data.prepare import prepare
    from dtrain.plan.propose import configure

    config, _ = configure(overrides, config_dir)
    cache = Path(config.run.cache) if config.run.cache else Path(config.run.dir) / ".cache"
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    prepared = prepare(config.dataset, config.objective, config.model, config.template.settled(),
                       seed=config.run.seed, eval_fraction=config.eval.fraction, cache=cache.absolute(),
                       say=note)  # fmt: skip
    for line in prepared.lines():
        note(line)
    note(f"objective: {objective(prepared)}; template={config.template.name}")
    return Opened(prepared, notes, config.dataset, config.run.seed)


def objective(prepared: Prepared) -> str:
    """What `auto` came to, with its values."""
    spec = prepared.objective
    values = [f"{field.name}={getattr(spec, field.name)}" for field in dataclasses.fields(spec)]  # type: ignore[arg-type]
    return " ".join([type(spec).__name__.lower(), *values])


def check_target(option: str, path: Path | None) -> None:
    """Before the rows are prepared, which may take long. Raises UserError where `path` cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it, or choose another")


def write(option: str, path: Path, content: bytes) -> None:
    """Raises UserError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}; choose another place") from error
