"""List a run's checkpoints, show, verify or compare them, ask for one, remove old ones, or import another tool's."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.checkpoint import manifest, retention, verify
from dtrain.checkpoint.manifest import Manifest, step_of
from dtrain.errors import CheckpointError, RunError, StorageError
from dtrain.verbs import _ckpt_import
from dtrain.verbs._checkpoints import STEP_HELP, at_step, chosen, named, some
from dtrain.verbs._manifests import by, differing, in_words, when
from dtrain.verbs._table import lines, size, table
from dtrain.verbs.runs import find

if TYPE_CHECKING:
    from dtrain.checkpoint.compare import Apart
    from dtrain.config.schema import Checkpoint
    from dtrain.runs import RunDir

_RUN = "a run's folder, or its name in runs/"
_PATH = f"{_RUN}; or a checkpoint's folder"
_LOOK_S = 0.2


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|show|verify|save|prune|diff|import")
    ls = _verb(verbs, "ls", "every checkpoint of a run, newest first, with its metrics and what points to it")
    ls.add_argument("run", type=Path, help=_PATH)
    ls.add_argument("--json", action="store_true", help="one JSON object a line")
    show = _verb(verbs, "show", "one checkpoint in full: the newest, or that of --step")
    show.add_argument("run", type=Path, help=_PATH)
    show.add_argument("--step", metavar="N", help=f"the one {STEP_HELP}")
    show.add_argument("--json", action="store_true", help="the manifest as it is")
    check = _verb(verbs, "verify", "read checkpoints whole and compare with what was written; exit code 2 where any "
                                   "is damaged")  # fmt: skip
    check.add_argument("run", type=Path, help=_PATH)
    check.add_argument("--step", metavar="N", help=f"only the one {STEP_HELP}")
    save = _verb(verbs, "save", "have a running run save after its present step; prints the folder once it is there")
    save.add_argument("run", type=Path, help=_RUN)
    save.add_argument("--wait", type=float, default=600.0, metavar="S", help="seconds to wait for it (600)")
    prune = _verb(verbs, "prune", "remove checkpoints that need not stay, once those that do are read and whole; what "
                                  "a pointer names stays")  # fmt: skip
    prune.add_argument("run", type=Path, help=_RUN)
    prune.add_argument("--keep-last", type=int, metavar="N", help="the newest N stay (the run's checkpoint.keep_last)")
    prune.add_argument("--keep-every", type=int, metavar="K", help="every K-th step stays, 0 for none (the run's own "
                                                                   "checkpoint.keep_every)")  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    diff = _verb(verbs, "diff", "what differs between two checkpoints, element by element; exit code 1 where anything "
                                "does")  # fmt: skip
    for name in ("a", "b"):
        diff.add_argument(name, type=Path, help=f"{_PATH}; of a run its newest whole one")
    diff.add_argument("--top", type=int, default=10, metavar="N", help="list so many parameters (10)")
    _ckpt_import.add(_verb(verbs, "import", _ckpt_import.SUMMARY))


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)


def run(args: argparse.Namespace) -> int:
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "ls": _ls, "show": _show, "verify": _verify, "save": _save, "prune": _prune, "diff": _diff,
        "import": _ckpt_import.run,
    }  # fmt: skip
    return verbs[args.verb](args)


@dataclasses.dataclass(frozen=True, slots=True)
class _One:
    """A checkpoint at a glance."""

    folder: Path
    read: Manifest | None
    """None where it cannot be read."""
    problems: list[str]
    """Of manifest and sizes."""
    pointers: list[str]

    @classmethod
    def of(cls, folder: Path) -> _One:
        try:
            read = manifest.read(folder)
        except CheckpointError as error:
            return cls(folder, None, [str(error)], _pointing(folder))
        return cls(folder, read, verify.quick_problems(folder), _pointing(folder))

    @property
    def step(self) -> int | None:
        return step_of(self.folder) if self.read is None else self.read.step


def _pointing(folder: Path) -> list[str]:
    return [name for name, target in _pointers(folder).items() if target == folder.name]


def _pointers(folder: Path) -> dict[str, str]:
    """Those beside it; none beside one that stands by itself, among files that have nothing to do with it."""
    return {} if step_of(folder) is None else retention.pointers(folder.parent)


def _ls(args: argparse.Namespace) -> int:
    found = named(args.run)
    ones = [one for folder in found.folders if (one := _One.of(folder)).folder.is_dir()]  # a run may just remove some
    if args.json:
        for one in ones:
            print(json.dumps(_fields(one)))
        return 0
    if not ones:
        print(f"no checkpoints in {found.run.checkpoints}")
        return 0
    metrics = _shown(ones)
    titles = ("step", "when", "size", "made by", *metrics, "pointers", "state")
    print("\n".join(table([titles, *(_row(one, metrics) for one in ones)], right=("step", "size", *metrics))))
    for one in ones:
        for problem in one.problems:
            print(f"step {one.step}: {problem}")
    root, known = ones[0].folder.parent, {one.folder.name for one in ones}
    for name, target in _pointers(ones[0].folder).items():
        if target not in known and not (root / target).is_dir():
            print(f"{root / name}: names {target!r}, which is not there")
    return 0


def _shown(ones: Sequence[_One]) -> list[str]:
    """Metrics that there are: losses, and what the best is told by; `show` and --json tell of the others."""
    reads = [one.read for one in ones if one.read]
    policies = [read.config.get("checkpoint") for read in reads]
    best_by = {one.get("best_by") for one in policies if isinstance(one, Mapping)}
    there = dict.fromkeys(name for read in reads for name in read.metrics)
    return [name for name in dict.fromkeys(["loss", "eval_loss", *there])
            if name in there and (name in ("loss", "eval_loss") or name in best_by)]  # fmt: skip


def _row(one: _One, metrics: list[str]) -> tuple[str, ...]:
    state = "damaged" if one.problems else "whole"
    if one.read is None:
        return (str(one.step), *("-" for _ in range(3 + len(metrics))), ",".join(one.pointers) or "-", state)
    values = [one.read.metrics.get(name) for name in metrics]
    said = ["-" if value is None else f"{value:.4f}" for value in values]
    return (str(one.step), when(one.read), size(one.read.num_bytes), by(one.read),
            *said, ",".join(one.pointers) or "-", state)  # fmt: skip


def _fields(one: _One) -> dict[str, object]:
    made = one.read.made_by if one.read else {}
    return {"step": one.step, "path": str(one.folder), "time": made.get("time"),
            "bytes": one.read.num_bytes if one.read else None, "strategy": made.get("strategy"),
            "ranks": made.get("size"), "metrics": dict(one.read.metrics) if one.read else {},
            "pointers": one.pointers, "problems": one.problems}  # fmt: skip


def _show(args: argparse.Namespace) -> int:
    folders = some(args.run).folders
    folder = folders[0] if args.step is None else at_step(folders, args.step)
    read = manifest.read(folder)
    if args.json:
        print(json.dumps(json.loads(manifest.dump(read)), indent=1))
        return 0
    problems = verify.quick_problems(folder)
    state = "damaged" if problems else "whole by its sizes; `dtrain ckpt verify` reads the content"
    print("\n".join(lines(in_words(folder, read, state=state, pointers=", ".join(_pointing(folder))))))
    for problem in problems:
        print(problem)
    return 0


def _verify(args: argparse.Namespace) -> int:
    folders = some(args.run).folders
    if args.step is not None:
        folders = [at_step(folders, args.step)]
    num_damaged = num_bytes = num_read = 0
    began = time.perf_counter()
    width = max(len(folder.name) for folder in folders)
    for folder in folders:
        started = time.perf_counter()
        found = verify.problems(folder)
        took = time.perf_counter() - started
        if (read_bytes := _bytes_in(folder)) is None:  # retention of a run that goes on
            print(f"{folder.name:<{width}}  removed meanwhile")
            continue
        num_bytes += read_bytes
        num_read += 1
        print(f"{folder.name:<{width}}  {'damaged' if found else 'ok':<7}  {size(read_bytes)}, "
              f"{read_bytes / took / 1e9:.2f} GB/s", flush=True)  # fmt: skip
        for problem in found:
            print(f"  {problem}")
        num_damaged += bool(found)
    if num_damaged == num_read:
        print("none is whole" if len(folders) > 1 else "it is not whole")
    else:
        took = time.perf_counter() - began
        print(f"{num_read - num_damaged} of {num_read} whole; read {size(num_bytes)} at "
              f"{num_bytes / took / 1e9:.2f} GB/s")  # fmt: skip
    return 2 if num_damaged or not num_read else 0


def _bytes_in(folder: Path) -> int | None:
    """None where it is gone; 0 where it may not be looked into."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except FileNotFoundError:
        return None
    except OSError:
        return 0


def _save(args: argparse.Namespace) -> int:
    run = find(args.run)
    if not args.wait > 0:
        raise RunError(f"--wait {args.wait:g}: must be more than 0 seconds")
    holder = run.holder()
    if holder is None:
        raise RunError(f"{run.path}: is not running, so there is nothing to save; `dtrain launch` with its run.name "
                       f"goes on with it, `dtrain ckpt ls {args.run}` shows what it has saved")  # fmt: skip
    before, unfinished = _identities(run)
    try:
        run.save_trigger.touch(exist_ok=False)
        mine = True
    except FileExistsError:  # somebody else asked for it just now
        mine = False
    print(f"asked {holder}; waiting for its next save", file=sys.stderr, flush=True)
    try:
        print(_saved(run, before, unfinished, time.monotonic() + args.wait))
    finally:
        if mine:
            run.save_trigger.unlink(missing_ok=True)
    return 0


def _identities(run: RunDir) -> tuple[set[tuple[str, int]], set[int]]:
    """Of the checkpoints that are there, name and inode; and inodes of those that are being written.

    A save that has begun already is not the one that is asked for; when it is committed, it keeps its inode.
    """
    there = {(folder.name, _inode(folder)) for folder in verify.committed(run.checkpoints)}
    return there, {_inode(path) for path in run.checkpoints.glob(".tmp-*")}


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


def _saved(run: RunDir, before: set[tuple[str, int]], unfinished: set[int], deadline: float) -> Path:
    """The checkpoint that comes, or at the run's end the last that came. Raises StorageError."""
    while True:
        alive = run.holder() is not None  # asked first, so that what the run saved last is seen
        new = [folder for folder in verify.committed(run.checkpoints)
               if (identity := (folder.name, _inode(folder))) not in before
               and (identity[1] not in unfinished or not alive)]  # fmt: skip
        if new:
            return new[0]
        if not alive:
            outcome = run.read_outcome()
            how = f" ({outcome.kind}: {outcome.message})" if outcome else ""
            raise StorageError(
                f"{run.path}: ended without a further checkpoint{how}; see `dtrain runs show {run.path}`"
            )
        if time.monotonic() > deadline:
            seen = "has not looked for it yet" if run.save_trigger.exists() else "took note, and has not finished"
            raise StorageError(f"{run.path}: no new checkpoint in time: the run {seen}; --wait S waits longer, and "
                               f"`dtrain runs show {run.path}` names its logs")  # fmt: skip
        time.sleep(_LOOK_S)


def _prune(args: argparse.Namespace) -> int:
    run = find(args.run)
    policy = _policy(run, args.keep_last, args.keep_every)
    if args.dry_run:
        return _prune_now(run, policy, dry_run=True)
    with run.lock(note=print):
        return _prune_now(run, policy, dry_run=False)


def _prune_now(run: RunDir, policy: Checkpoint, *, dry_run: bool) -> int:
    from dtrain.folders import discard, remove_leftovers

    whole, damaged = _proven(run.checkpoints, policy)
    useless = retention.useless(run.checkpoints, whole, policy)
    for folder, problems in damaged.items():
        for problem in problems:
            print(f"damaged{'' if folder in useless else ', left alone'}: {problem}")
    if not dry_run:
        for path in remove_leftovers(run.checkpoints, mine=True):
            print(f"removed {path}, which a killed save left")
    gone = [*retention.due(run.checkpoints, whole, policy), *useless]
    total = 0
    for folder in gone:
        num_bytes = sum(path.lstat().st_size for path in folder.glob("*.safetensors"))
        total += num_bytes
        if not dry_run:
            discard(folder)
        print(f"{'would remove' if dry_run else 'removed'} {folder}  {size(num_bytes)}")
    left = len(verify.committed(run.checkpoints)) - (len(gone) if dry_run else 0)
    print(f"{len(gone)} {'would go' if dry_run else 'gone'}, {size(total)}; {left} stay")
    return 0


def _proven(root: Path, policy: Checkpoint) -> tuple[dict[int, Mapping[str, float | None]], dict[Path, list[str]]]:
    """The metrics of the checkpoints that are whole, by step, and what is wrong with the others. Where any is to go,
    those that are to stay are read, so that none goes for one that is whole by its size alone.
    """
    whole = retention.whole(root)
    damaged = {folder: verify.quick_problems(folder) for folder in verify.committed(root)
               if manifest.step_of(folder) not in whole}  # fmt: skip
    proven: set[int] = set()
    while True:
        gone = [*retention.due(root, whole, policy), *retention.useless(root, whole, policy)]
        unread = {step: folder for step in whole if (folder := root / manifest.folder_name(step)) not in gone
                  and step not in proven}  # fmt: skip
        if not gone or not unread:
            return whole, damaged
        for step, folder in unread.items():
            if problems := verify.problems(folder):
                damaged[folder] = problems
                del whole[step]
            else:
                proven.add(step)


def _policy(run: RunDir, keep_last: int | None, keep_every: int | None) -> Checkpoint:
    """The run's own, but for what is typed. Its file is read as data: no plugin of it is imported. Raises RunError."""
    from dtrain.config.compose import load_yaml
    from dtrain.config.schema import Checkpoint

    for name, value, least in (("--keep-last", keep_last, 1), ("--keep-every", keep_every, 0)):
        if value is not None and value < least:
            raise RunError(f"{name} {value}: must be at least {least}")
    data = load_yaml(run.config)
    said = data.get("checkpoint") if isinstance(data, dict) else None
    if not isinstance(said, dict):
        raise RunError(f"{run.config}: says nothing of checkpoint.keep_last and the like; it is not what a run wrote")
    known = {key: said[key] for key in ("keep_last", "keep_every", "best_by", "best_mode") if key in said}
    try:
        policy = Checkpoint(**known)
    except ValueError as error:
        raise RunError(f"{run.config}: checkpoint: cannot be used ({error})") from None
    return dataclasses.replace(policy, keep_last=keep_last or policy.keep_last,
                               keep_every=policy.keep_every if keep_every is None else keep_every or None)  # fmt: skip


def _diff(args: argparse.Namespace) -> int:
    from dtrain.checkpoint.compare import apart
    from dtrain.checkpoint.storage import Reader

    if args.top < 0:
        raise CheckpointError(f"--top {args.top}: must be at least 0")
    readers = []
    for letter, name in (("a", args.a), ("b", args.b)):
        folder = chosen(name, None, verify.quick_problems, print)
        readers.append(Reader(folder, read := manifest.read(folder)))
        print(f"{letter}  {folder}  step {read.step}, {by(read)}, {when(read)}")
    a, b = (reader.manifest for reader in readers)
    found = list(differing(a, b))
    for one in found:
        print("\n".join([one.title, *(f"  {line}" for line in one.lines)]))
    tensors = sorted(
        apart(*readers), key=lambda one: (-math.inf if math.isnan(one.absolute) else -one.absolute, one.name)
    )
    for reader in readers:
        reader.close()
    for state in dict.fromkeys(state for one in a.parameters.values() for state in one.states):
        shared = [name for name, one in a.parameters.items() if state in one.states and name in b.parameters
                  and b.parameters[name].shape == one.shape and state in b.parameters[name].states]  # fmt: skip
        print("\n".join(_state_lines(state, len(shared), [one for one in tensors if one.state == state], args.top)))
    return 1 if found or tensors else 0


def _state_lines(state: str, num_shared: int, found: list[Apart], top: int) -> list[str]:
    """How far apart one state is: parameter by parameter for the weights, in a line for what the optimizer keeps."""
    if not found:
        return [f"{state}: bit-equal in {num_shared} parameters" if num_shared else f"{state}: nothing to compare"]
    said = f"{state}: differs in {len(found)} of {num_shared} parameters"
    if state != "weight":
        most = found[0]
        return [f"{said}, at most by {most.absolute:.3e} (relative {most.relative:.3e}), in {most.name}"]
    rows = [("  parameter", "absolute", "relative"),
            *((f"  {one.name}", f"{one.absolute:.3e}", f"{one.relative:.3e}") for one in found[:top])]  # fmt: skip
    more = [f"  and {len(found) - top} more; --top N lists more"] if len(found) > top else []
    return [f"{said}; the largest difference of an element:", *table(rows, right=("absolute", "relative")), *more]
