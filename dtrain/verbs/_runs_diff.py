"""What differs between two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dtrain.verbs._table import table

if TYPE_CHECKING:
    from dtrain.runs import RunDir

PLACES = ("run.name", "run.dir", "run.cache")
"""Keys that differ between any two runs and mean nothing."""


def diff(one: RunDir, other: RunDir) -> int:
    """Print it; the exit code is 1 where something differs, as of diff itself."""
    both = [dict(_said(run)) for run in (one, other)]
    rows = [(key, _text(both[0].get(key)), _text(both[1].get(key)))
            for key in dict.fromkeys([*both[0], *both[1]]) if both[0].get(key) != both[1].get(key)]  # fmt: skip
    if not rows:
        print("no difference")
        return 0
    print("\n".join(table([("", str(one.name), str(other.name)), *rows])))
    return 1


def _said(run: RunDir) -> Iterator[tuple[str, Any]]:
    """By the keys of the configuration first, then what came of it."""
    from dtrain.config.compose import load_yaml
    from dtrain.runs.account import account
    from dtrain.runs.listing import RUNNING, summary

    for key, value in _flat(load_yaml(run.config)):
        if key not in PLACES:
            yield key, value
    manifest, one = run.read_manifest(), summary(run)
    yield "data", (manifest.get("data") or {}).get("digest")
    yield "ranks", manifest.get("size")
    for name, version in (manifest.get("packages") or {}).items():
        yield name, version
    yield "git", (manifest.get("git") or {}).get("commit")
    yield "state", one.state
    yield "step", one.step
    for name, value in (manifest.get("result") or {}).items():
        if name != "steps":
            yield name.replace("_", " "), value
    time = account(run, running=one.state in RUNNING)
    if time is not None and time.goodput is not None:
        yield "wall time", f"{time.wall_s:.0f} s"
        yield "in training steps", f"{time.goodput:.0%}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(one, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
