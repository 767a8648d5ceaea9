"""Which checkpoints stay. No torch here."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import folder_name, step_of
from dtrain.checkpoint.verify import committed, quick_problems
from dtrain.config.schema import Checkpoint
from dtrain.errors import CheckpointError
from dtrain.failpoints import reach
from dtrain.folders import discard

LATEST, BEST = "latest", "best"


def superfluous(
    steps: Mapping[int, Mapping[str, float | None]], policy: Checkpoint, pinned: Sequence[int] = ()
) -> list[int]:
    """Steps that need not stay, oldest first. `steps`: those there are, each with its metrics.

    The newest `keep_last` stay, each `keep_every`-th step, the best by `best_by`, and what is pinned.
    """
    stay = {*sorted(steps)[-policy.keep_last :], *pinned}
    if policy.keep_every:
        stay |= {step for step in steps if step % policy.keep_every == 0}
    found = best(steps, policy)
    return sorted(set(steps) - stay - ({found} if found is not None else set()))


def best(steps: Mapping[int, Mapping[str, float | None]], policy: Checkpoint) -> int | None:
    """The step that is best by `best_by`, the earlier one of equals; None where nothing was measured."""
    sign = 1 if policy.best_mode == "min" else -1
    values = {step: metrics.get(policy.best_by or "") for step, metrics in steps.items()}
    measured = [(sign * value, step) for step, value in values.items() if value is not None and math.isfinite(value)]
    return min(measured)[1] if measured else None


def whole(root: Path) -> dict[int, Mapping[str, float | None]]:
    """Metrics of every checkpoint under `root` whose manifest and sizes are right, by step."""
    found: dict[int, Mapping[str, float | None]] = {}
    for folder in committed(root):
        if not quick_problems(folder):
            read = manifest.read(folder)
            found[read.step] = read.metrics
    return found


def pointers(root: Path) -> dict[str, str]:
    """Files and links beside the checkpoints that name one: `latest`, `best`, and whatever a person puts there."""
    try:
        names = [path for path in sorted(root.iterdir()) if not path.name.startswith(".") and step_of(path) is None]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    named = {path.name: _named(path) for path in names}
    return {name: title for name, title in named.items() if title is not None}


def pointed(path: Path) -> Path | None:
    """The checkpoint that the pointer `path` names; None where it names none that is there."""
    target = path.parent / (_named(path) or "")
    return target if target.parent == path.parent and step_of(target) is not None and target.is_dir() else None


def _named(path: Path) -> str | None:
    """What a pointer says; None where it is none. A link to a checkpoint is one too. Raises CheckpointError: what it
    says is not to be removed.
    """
    if path.is_symlink():
        return path.readlink().name
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(200).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), and it may name a checkpoint") from None


def point(root: Path, name: str, step: int) -> None:
    """Let `name` name the checkpoint of that step. A reader sees the old one or the new one."""
    path, tmp = root / name, root / f".tmp-{name}-{secrets.token_hex(4)}"
    try:
        with tmp.open("w", encoding="utf-8") as file:
            file.write(folder_name(step) + "\n")
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def due(root: Path, steps: Mapping[int, Mapping[str, float | None]], policy: Checkpoint) -> list[Path]:
    """The checkpoints among `steps` that need not stay, as the pointers are now; a pointed one is never among them."""
    named = set(pointers(root).values())
    pinned = [step for step in steps if folder_name(step) in named]
    return [root / folder_name(step) for step in superfluous(steps, policy, pinned)]


def useless(root: Path, steps: Mapping[int, Mapping[str, float | None]], policy: Checkpoint) -> list[Path]:
    """The damaged checkpoints under `root` that no run will need repaired: there are as many later ones as are to stay
    among `steps`, the whole ones, and neither a pointer nor `keep_every` asks for them.
    """
    if len(steps) < policy.keep_last:
        return []
    oldest, named = sorted(steps)[-policy.keep_last], set(pointers(root).values())
    found = []
    for folder in reversed(committed(root)):
        step = step_of(folder)
        assert step is not None
        kept = folder.name in named or (policy.keep_every and step % policy.keep_every == 0)
        if step < oldest and step not in steps and not kept:
            found.append(folder)
    return found


def prune(root: Path, policy: Checkpoint, *, newest: int | None = None) -> list[Path]:
    """Set the pointers, and remove what need not stay; returns what was removed. What is damaged does not count, so
    that as many as the policy says are whole by their sizes; it goes once it is useless, and no sooner than after the
    next save where a pointer named it until now: the disk may have failed to show it for a moment.

    `newest`: the step just saved. Those of later steps, which a resumed run passed over, do not count.
    """
    measured = {step: metrics for step, metrics in whole(root).items() if newest is None or step <= newest}
    if not measured:
        return []
    damaged = useless(root, measured, policy)
    point(root, LATEST, max(measured))
    found = best(measured, policy)
    if found is not None:
        point(root, BEST, found)
    reach("ckpt.pointed")
    removed = [*due(root, measured, policy), *damaged]
    for folder in removed:
        discard(folder)
    return removed
