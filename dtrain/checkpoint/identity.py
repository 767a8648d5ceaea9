"""What decides the mathematics of a run, and what of it differs from a checkpoint's. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.config import frozen
from dtrain.config.schema import Config
from dtrain.config.spec import ScheduleSpec

_GROUPS = ("objective", "tuning", "optim", "schedule")
_KEYS = (("run", "seed"), ("train", "steps"), ("train", "precision"), ("train", "grad_clip"), ("batch", "global_batch"))
_NO_MATHEMATICS = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
"""Of a model's config.json."""


def identity(config: Config, *, data: str, tokenizer: str, assets: Path, base: str | None = None) -> dict[str, Any]:
    """By the keys that a user knows. Of a settled configuration; `data`, `tokenizer` and `base`, of the weights that
    stay as they are, are digests of their content, so that it does not matter where files lie. Not in it: strategy,
    ranks, micro-batch, device, logging, places.
    """
    plain = frozen.to_plain(config)
    said: dict[str, Any] = {}
    for group in _GROUPS:
        said |= dict(_flat(group, plain[group]))
    said |= {f"{section}.{key}": plain[section][key] for section, key in _KEYS}
    model = json.loads((assets / "config.json").read_text(encoding="utf-8"))
    said |= dict(_flat("model", {key: value for key, value in model.items() if key not in _NO_MATHEMATICS}))
    return {**said, "data": data, "tokenizer": tokenizer, **({} if base is None else {"base": base})}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(path if key == "_target_" else f"{path}.{key}", one)
    else:
        yield path, value


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: was {self.before}, is {self.now}"

    def allowed(self, by: Sequence[str]) -> bool:
        return any(self.key == name or self.key.startswith(f"{name}.") for name in by)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, same_course: bool) -> list[Difference]:
    """What decides the mathematics and is not the same. `same_course`: the learning rates of the steps that are done
    are the same under both lengths, so that a longer or shorter run is no difference.
    """
    now = json.loads(json.dumps(now, default=str))
    keys = [*now, *(key for key in before if key not in now)]
    found = [Difference(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    return [one for one in found if not (same_course and one.key == "train.steps")]


def same_course(schedule: ScheduleSpec, steps: tuple[int, int], done: int) -> bool:
    """Whether the schedule gives the steps that are done the same rates for both lengths: the run is then what it would
    have been with the other length from the beginning.
    """
    return done <= min(steps) and all(schedule.factor(i, steps[0]) == schedule.factor(i, steps[1]) for i in range(done))
