"""Which checkpoints stay. No torch here."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.checkpoint import manifest
from dtrain.checkpoint.verify import committed
from dtrain.config.schema import Checkpoint
from dtrain.errors import CheckpointError
from dtrain.failpoints import reach
from dtrain.folders import discard

LATEST, BEST = "latest", "best"


def superfluous(steps: Mapping[int, Mapping[str, float]], policy: Checkpoint, pinned: Sequence[int] = ()) -> list[int]:
    """Steps that need not stay, oldest first. `steps`: those there are, each with its metrics.

    The newest `keep_last` stay, each `keep_every`-th step, the best by `best_by`, and what is pinned.
    """
    stay = {*sorted(steps)[-policy.keep_last :], *pinned}
    if policy.keep_every:
        stay |= {step for step in steps if step % policy.keep_every == 0}
    found = best(steps, policy)
    return sorted(set(steps) - stay - ({found} if found is not None else set()))


def best(steps: Mapping[int, Mapping[str, float]], policy: Checkpoint) -> int | None:
    """The step that is best by `best_by`, the earlier one of equals; None where nothing was measured."""
    sign = 1 if policy.best_mode == "min" else -1
    values = {step: metrics.get(policy.best_by or "") for step, metrics in steps.items()}
    measured = [(sign * value, step) for step, value in values.items() if value is not None and math.isfinite(value)]
    return min(measured)[1] if measured else None


def metrics_of(root: Path) -> dict[int, Mapping[str, float]]:
    """Of every checkpoint under `root` that has a readable manifest, by step."""
    found: dict[int, Mapping[str, float]] = {}
    for folder in committed(root):
        try:
            one = manifest.read(folder)
        except CheckpointError:
            continue
        found[one.step] = one.metrics
    return found


def pointers(root: Path) -> dict[str, str]:
    """Files beside the checkpoints that name one of them: `latest`, `best`, and whatever a person puts there."""
    if not root.is_dir():
        return {}
    files = [path for path in sorted(root.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return {path.name: path.read_text(encoding="utf-8", errors="replace")[:200].strip() for path in files}


def point(root: Path, name: str, step: int) -> None:
    """Let `name` name the checkpoint of that step. A reader sees the old one or the new one."""
    path, tmp = root / name, root / f".tmp-{name}-{secrets.token_hex(4)}"
    with tmp.open("w", encoding="utf-8") as file:
        file.write(manifest.folder_name(step) + "\n")
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


def prune(root: Path, policy: Checkpoint, *, newest: int | None = None) -> list[Path]:
    """Remove what need not stay, after the pointers are set; returns what was removed. A pointed one is never removed.

    `newest`: the step just saved. Those of later steps, which a resumed run passed over, do not count.
    """
    measured = {step: metrics for step, metrics in metrics_of(root).items() if newest is None or step <= newest}
    if not measured:
        return []
    point(root, LATEST, max(measured))
    found = best(measured, policy)
    if found is not None:
        point(root, BEST, found)
    reach("ckpt.pointed")
    pinned = [step for step in measured if manifest.folder_name(step) in pointers(root).values()]
    removed = [root / manifest.folder_name(step) for step in superfluous(measured, policy, pinned)]
    for folder in removed:
        discard(folder)
    return removed
