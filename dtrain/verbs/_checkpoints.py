"""Which checkpoints a name on the command line means."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dtrain.checkpoint import manifest, retention
from dtrain.checkpoint.manifest import folder_name, step_of
from dtrain.checkpoint.verify import committed
from dtrain.errors import CheckpointError
from dtrain.runs import RunDir

STEP_HELP = "of this step, or that a pointer names, as `best`"


class Named(NamedTuple):
    folders: list[Path]
    """Newest first, unchecked."""
    run: RunDir
    """Whose they are, where the folder lies in one."""


def named(name: Path) -> Named:
    """Of a run by folder or name, of a folder of checkpoints, or of one itself, or of a pointer to it. Raises RunError
    where it is none.
    """
    from dtrain.verbs.runs import find

    for place in (name, Path("runs") / name):
        path = Path(os.path.abspath(place))  # noqa: PTH100  a symlink stays one: its name is what the user knows
        if (path / "config.yaml").is_file():
            break  # a run, whatever its name
        if path.is_file() and (pointed := retention.pointed(path)) is not None:
            return Named([pointed], RunDir(path.parent.parent))
        if not path.is_dir():
            continue
        if step_of(path) is not None or (path / manifest.NAME).is_file():
            return Named([path], RunDir(path.parent.parent))
        if found := committed(path):
            return Named(found, RunDir(path.parent))
    run = find(name)
    return Named(committed(run.checkpoints), run)


def some(name: Path) -> Named:
    """As `named`. Raises CheckpointError where there are none."""
    found = named(name)
    if not found.folders:
        raise CheckpointError(f"{found.run.checkpoints}: no checkpoints; checkpoint.every_steps, every_minutes and "
                              f"at_end say when a run saves")  # fmt: skip
    return found


def at_step(folders: Sequence[Path], step: str) -> Path:
    """The one of a step, or that a pointer beside them names. Raises CheckpointError."""
    root = folders[0].parent
    title = folder_name(int(step)) if step.isdecimal() else retention.pointers(root).get(step)
    found = next((folder for folder in folders if folder.name == title), None)
    if found is None:
        steps = ", ".join(str(step_of(folder) or folder.name) for folder in reversed(folders))
        further = ", ".join(retention.pointers(root))
        raise CheckpointError(f"--step {step}: no such checkpoint in {root}; there are: {steps}"
                              + (f"; and pointers: {further}" if further else ""))  # fmt: skip
    return found


def chosen(name: Path, step: str | None, problems: Callable[[Path], list[str]], say: Callable[[str], None]) -> Path:
    """The checkpoint of `step`, else the newest without problems; says what is passed over. Raises CheckpointError."""
    found = some(name)
    folders = found.folders if step is None else [at_step(found.folders, step)]
    wrong: list[str] = []
    for folder in folders:
        these = problems(folder)
        if not these:
            return folder
        wrong += these
        say(f"passed over {folder}: {'; '.join(these[:3])}")
    raise CheckpointError("\n".join([f"{folders[0] if len(folders) == 1 else folders[0].parent}: not whole:",
                                     *(f"  {one}" for one in wrong)]))  # fmt: skip
