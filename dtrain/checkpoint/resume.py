"""Which checkpoint a run goes on from, chosen before any worker starts. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.checkpoint import manifest, retention
from dtrain.checkpoint.identity import differences, same_course
from dtrain.checkpoint.verify import committed, quick_problems
from dtrain.config.compose import clip, nearest
from dtrain.errors import CheckpointError, ConfigError
from dtrain.runs import RunDir

if TYPE_CHECKING:
    from dtrain.config.schema import Config

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on from."""

    candidates: tuple[Path, ...]
    """Checkpoints whose manifest and sizes are right, the best first: the ranks take the first whose content is too."""
    step: int
    """Of the first."""
    differences: tuple[str, ...] = ()
    """From the checkpoint, allowed by the user."""


def choose(run: RunDir, config: Config, identity: Mapping[str, Any], say: Say) -> Start | None:
    """The newest good checkpoint of the run itself, else what `resume.path` names; None to start from the beginning.

    Says what it passes over and why. Raises CheckpointError where there are checkpoints and none is whole, and
    ConfigError where the configuration changes the mathematics without leave.
    """
    own = committed(run.checkpoints)
    if own:
        start = _good(own, f"{run.checkpoints}: none of its checkpoints is whole", say)
        say(f"resume: going on from {start.candidates[0]}")
    elif config.resume.path is not None:
        start = _named(Path(config.resume.path), say)
        say(f"resume: starting from {start.candidates[0]}")
    else:
        _check_allow(config.resume.allow, [*identity])
        return None
    if (why := config.strategy.unsavable()) is not None:
        raise ConfigError(f"{why}, so that it cannot go on from {start.candidates[0]}; take another strategy, or begin "
                          f"anew with another run.name and without resume")  # fmt: skip
    return _compared(start, config, identity, say)


def find(path: Path) -> list[Path]:
    """Checkpoints that `path` names: itself, the one that a pointer there says, or all of a run's or of its
    `checkpoints` folder, newest first.

    Raises CheckpointError where there are none.
    """
    if path.is_file():
        if (pointed := retention.pointed(path)) is not None:
            return [pointed]
        raise CheckpointError(f"{path}: a file that names no checkpoint beside it; give a checkpoint's folder or a "
                              f"run's")  # fmt: skip
    of_checkpoint = manifest.step_of(path) is not None or (path / manifest.NAME).is_file()
    if of_checkpoint and path.is_dir() and not (path / "config.yaml").is_file():
        return [path]
    for root in (path / "checkpoints", path):
        if found := committed(root):
            return found
    raise CheckpointError(f"{path}: no checkpoint, and no run that has any; `dtrain runs ls` and `dtrain ckpt ls RUN` "
                          f"show what there is")  # fmt: skip


def _named(path: Path, say: Say) -> Start:
    found = find(path)
    return _good(found, f"resume.path={path}: not whole", say)


def _good(folders: Sequence[Path], otherwise: str, say: Say) -> Start:
    """Those that look whole. Raises CheckpointError with all that is wrong with each."""
    good, wrong = [], []
    for folder in folders:
        problems = quick_problems(folder)
        if problems:
            wrong += problems
            say(f"resume: passed over {folder}: {'; '.join(problems[:3])}")
        else:
            good.append(folder)
    if not good:
        raise CheckpointError("\n".join([f"{otherwise}; restore one, or remove them to start from the beginning:",
                                         *(f"  {problem}" for problem in wrong)]))  # fmt: skip
    return Start(tuple(good), manifest.read(good[0]).step)


def _compared(start: Start, config: Config, identity: Mapping[str, Any], say: Say) -> Start:
    """Keep the candidates that this configuration may go on from; refuse where the first is not one."""
    _check_allow(config.resume.allow, [*identity, *manifest.read(start.candidates[0]).identity])
    kept: list[Path] = []
    for folder in start.candidates:
        read = manifest.read(folder)
        assert config.train.steps is not None
        before = read.identity.get("train.steps", config.train.steps)
        steps = (before if isinstance(before, int) else 0, config.train.steps)
        course = same_course(config.schedule, steps, read.step)
        found = differences(read.identity, identity, same_course=course) if read.identity else []
        refused = [one for one in found if not one.allowed(config.resume.allow)]
        if refused and not kept:
            # Of another choice in a group all keys are others: to name the group says it, and accepts it.
            groups = {one.key for one in refused if "." not in one.key}
            refused = [one for one in refused if one.key in groups or one.key.partition(".")[0] not in groups]
            keys = ",".join(one.key for one in refused)
            raise ConfigError(
                f"{folder}: made with other values of what decides the result:\n"
                + "".join(f"  {one}\n" for one in refused)
                + f"  set them back, or type 'resume.allow=[{keys}]' to go on with the new ones, or another run.name"
            )
        if refused:
            continue
        if not kept:
            start = dataclasses.replace(start, step=read.step, differences=tuple(map(str, found)))
            for one in found:
                say(f"resume: allowed: {one}")
            if not read.identity:
                say(f"resume: {folder} was imported from {read.made_by.get('imported')}: how that was made is not "
                    f"known, so nothing of this configuration could be compared with it")  # fmt: skip
            if read.made_by.get("strategy") is not None:  # changes nothing in the mathematics
                say(f"resume: made by {read.made_by['strategy']} on {read.made_by.get('size')} ranks")
        kept.append(folder)
    return dataclasses.replace(start, candidates=tuple(kept))


def _check_allow(allow: Sequence[str], keys: Sequence[str]) -> None:
    known = {*keys, *(key.split(".")[0] for key in keys)}
    wrong = [name for name in allow if name not in known]
    if wrong:
        raise ConfigError.of(f"resume.allow={clip(name)}: not one of the keys that decide the result"
                             f"{nearest(name, sorted(known))}" for name in wrong)  # fmt: skip
