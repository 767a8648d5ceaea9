"""What a manifest says, in words; and how two of them differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.checkpoint.identity import differences
from dtrain.checkpoint.manifest import Manifest
from dtrain.verbs._table import size


def by(read: Manifest) -> str:
    """Who made it: the strategy and on how many ranks."""
    said = read.made_by
    if said.get("imported"):
        return "imported"
    return f"{said['strategy']} x {said.get('size', '?')}" if said.get("strategy") else "-"


def when(read: Manifest) -> str:
    return str(read.made_by.get("time") or "-")[:19]


def in_words(folder: Path, read: Manifest, *, state: str, pointers: str) -> list[tuple[str, object]]:
    """All that a person asks of it, as names and values."""
    made = read.made_by
    tensors = [math.prod(one.shape) for one in read.parameters.values()]
    states = list(dict.fromkeys(state for one in read.parameters.values() for state in one.states))
    found: list[tuple[str, object]] = [
        ("checkpoint", folder),
        ("step", f"{read.step:,} of {_at(read.config, 'train', 'steps') or '?'}"),
        *_origin(read),
        ("state", state),
        ("pointers", pointers or "none"),
        ("size", f"{size(read.num_bytes)} in {_count(len(read.files), 'file')}"),
        ("parameters", f"{sum(tensors):,} in {_count(len(tensors), 'tensor')}"
                       + (f", and {_count(len(read.tied), 'name')} tied to one of them" if read.tied else "")),
        ("kept of each", f"{', '.join(states)}: fp32, {4 * len(states)} bytes a parameter"),
        ("progress", _listed(read.progress)),
        ("counters", _listed(read.counters)),
        ("metrics", _listed(read.metrics)),
        ("versions", _listed(_in(made, "packages"))),
    ]  # fmt: skip
    if git := _in(made, "git"):
        found.append(("git", f"{str(git.get('commit', ''))[:12]}{' with changes' if git.get('dirty') else ''}"))
    if not read.identity:
        return [*found, ("result by", "not known: nothing is compared when a run starts from it")]
    found.append(("result by", "what decides it; a run that differs in it is not gone on with:"))
    return [*found, *((f"  {group}", _listed(values)) for group, values in _grouped(read.identity).items())]


def _origin(read: Manifest) -> list[tuple[str, object]]:
    made = read.made_by
    if made.get("imported"):
        return [("imported", f"{when(read)} from {made['imported']} ({made.get('kind') or '?'})")]
    return [("saved", f"{when(read)} by attempt {made.get('attempt', '?')} of run {made.get('name') or '?'}"),
            ("made by", f"{by(read)} ranks on {made.get('device') or '?'}")]  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Differs:
    """Of two manifests: a title and lines below it."""

    title: str
    lines: tuple[str, ...]


def differing(a: Manifest, b: Manifest) -> Iterator[Differs]:
    """Of identity, progress, counters and parameters, only what is not the same."""
    found = {
        "identity": [str(one) for one in differences(a.identity, b.identity, same_course=False)],
        "progress": _changes(a.progress, b.progress),
        "counters": _changes(a.counters, b.counters),
        "tied": _changes(a.tied, b.tied),
        "parameters": _changes(_kept(a), _kept(b)),
    }
    for title, lines in found.items():
        if lines:
            yield Differs(f"{title}: {len(lines)} of {len({*getattr(a, title), *getattr(b, title)})}", tuple(lines))


def _kept(read: Manifest) -> dict[str, str]:
    return {name: f"{', '.join(one.states)} of shape {one.shape}" for name, one in read.parameters.items()}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*a, *b])
    return [f"{key}: {a.get(key, 'none')} -> {b.get(key, 'none')}" for key in keys if a.get(key) != b.get(key)]


def _grouped(identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keys by their first word, and what is left of them."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in identity.items():
        group, _, rest = key.partition(".")
        groups.setdefault(group, {})[rest] = value
    return groups


def _listed(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_short(value)}" if key else _short(value) for key, value in values.items()) or "none"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _in(made_by: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What is said there; nothing where it is of another kind, as in what somebody wrote by hand."""
    said = made_by.get(key)
    return said if isinstance(said, Mapping) else {}


def _at(config: Mapping[str, Any], *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _count(num: int, name: str) -> str:
    return f"{num:,} {name}" + ("" if num == 1 else "s")
