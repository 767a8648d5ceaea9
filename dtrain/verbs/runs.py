"""List runs, show, follow, compare or stop them: state, progress, losses, what the time went into, where logs are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import RunError
from dtrain.runs import RunDir, RunSummary, list_runs
from dtrain.verbs import _runs_diff as _diff
from dtrain.verbs import _runs_stop as _stop
from dtrain.verbs import _runs_tail as _tail
from dtrain.verbs._table import lines, table

if TYPE_CHECKING:
    from dtrain.runs import Outcome
    from dtrain.runs.account import Account

ATTEMPTS = 8
"""That `show` lists."""


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|show|tail|diff|stop")
    ls = verbs.add_parser("ls", help="every run of a folder, newest first")
    ls.add_argument("dir", nargs="?", type=Path, default=Path("runs"), help="where run folders are (runs)")
    ls.add_argument("--json", action="store_true", help="one JSON object a line")
    show = verbs.add_parser("show", help="one run in full")
    tail = verbs.add_parser("tail", help="its last steps; with -f those to come")
    tail.add_argument("-n", "--lines", type=int, default=10, metavar="N", help="the last N steps (10)")
    tail.add_argument("-f", "--follow", action="store_true", help="until it ends")
    diff = verbs.add_parser("diff", help="what differs between two: configuration, data, versions, results")
    stop = verbs.add_parser("stop", help="have it save and end")
    stop.add_argument("--now", action="store_true", help="end it at once; what was saved before counts")
    stop.add_argument("--wait", type=float, default=60.0, metavar="S", help="how long to wait for its end (60)")
    for one in (show, tail, diff, stop):
        one.add_argument("run", type=Path, help="its folder, or its name in runs/")
    diff.add_argument("other", type=Path, help="the second one")


def run(args: argparse.Namespace) -> int:
    if args.verb == "ls":
        return _ls(args.dir, as_json=args.json)
    run = find(args.run)
    if args.verb == "tail":
        return _tail.tail(run, args.lines, follow=args.follow)
    if args.verb == "diff":
        return _diff.diff(run, find(args.other))
    if args.verb == "stop":
        return _stop.stop(run, now=args.now, wait_s=args.wait)
    return _show(run)


def find(name: Path) -> RunDir:
    """A run by its folder, or by its name in `runs/`. Raises RunError."""
    for path in (name, Path("runs") / name):
        if (path / "config.yaml").is_file():
            return RunDir(path)
    known = [one.name for one in list_runs(Path("runs"))]
    raise RunError(
        f"{name}: no run of that name or folder" + (f"; in runs/ there are: {', '.join(known[:8])}" if known else "")
    )


def _ls(root: Path, *, as_json: bool) -> int:
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; give the one that run.dir named")
    found = list_runs(root)
    if as_json:
        for one in found:
            print(json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in _fields(one)}))
        return 0
    if not found:
        print(f"no runs in {root}")
        return 0
    print("\n".join(overview(found)))
    return 0


def overview(runs: Sequence[RunSummary]) -> list[str]:
    """A line for each, below their titles."""
    titles = ("name", "state", "step", "loss", "eval", "strategy", "ranks", "started")
    return table([titles, *map(_row, runs)])


def _fields(one: RunSummary) -> Sequence[tuple[str, object]]:
    return [(name, getattr(one, name)) for name in one.__dataclass_fields__]


def _row(one: RunSummary) -> tuple[str, ...]:
    step = "-" if one.step is None else f"{one.step}/{one.steps or '?'}"
    loss, held_out = ("-" if value is None else f"{value:.4f}" for value in (one.loss, one.eval_loss))
    return (
        one.name,
        one.state,
        step,
        loss,
        held_out,
        one.strategy or "-",
        str(one.size or "-"),
        (one.started or "-")[:19],
    )


def _show(run: RunDir) -> int:
    from dtrain.runs.account import account
    from dtrain.runs.listing import RUNNING, summary
    from dtrain.trackers._words import duration

    one, manifest, outcome = summary(run), run.read_manifest(), run.read_outcome()
    pairs: list[tuple[str, object]] = [
        ("run", run.path), ("state", one.state), ("step", f"{one.step or 0} of {one.steps or '?'}"),
        ("loss", "-" if one.loss is None else f"{one.loss:.4f}"), ("strategy", one.strategy), ("ranks", one.size),
        ("device", manifest.get("device")), ("started", one.started), ("attempts", one.attempts),
    ]  # fmt: skip
    result = manifest.get("result") or {}
    pairs += [(key.replace("_", " "), f"{value:.4f}") for key, value in result.items() if isinstance(value, float)]
    time = account(run, running=one.state in RUNNING)
    if time is not None and time.goodput is not None:
        pairs.append(("time", f"{duration(time.wall_s)}: {_shares(time)}"))
        pairs += [] if time.left_s is None else [("left", duration(time.left_s))]
    if outcome is not None and outcome.message:
        pairs.append(("outcome", f"{outcome.kind}: {outcome.message.splitlines()[0]}"))
        pairs += _failure(outcome, run)
    git = manifest.get("git") or {}
    if git:
        pairs.append(("git", f"{git.get('commit', '')[:12]}{' with changes' if git.get('dirty') else ''}"))
    if one.attempts > 1:
        pairs += [("attempt" if i == 0 else "", text) for i, text in enumerate(_attempts(manifest))]
    pairs += [("logs", run.attempt_dir(one.attempts - 1))] if one.attempts else []
    pairs += [("export", run.export)] if run.export.is_dir() else []
    print("\n".join(lines(pairs)))
    return 0


def _failure(outcome: Outcome, run: RunDir) -> list[tuple[str, object]]:
    """Who failed where, what to do about it, and the log to open."""
    from dtrain.launchers.verdict import known_cause

    one = outcome.failure
    if one is None:
        return []
    where = f"rank {one.rank} on {one.host}{f' in {one.phase}' if one.phase else ''}"
    pairs: list[tuple[str, object]] = [("failure", where + (f" at step {one.step}" if one.step is not None else ""))]
    known = known_cause(outcome, run)
    return [*pairs, *([("hint", known)] if known else []), ("open", run.path / one.log)]


def _shares(time: Account) -> str:
    """Goodput first, then the rest, the largest first."""
    rest = sorted(((seconds, name) for name, seconds in time.spent.items() if name != "steps"), reverse=True)
    parts = [f"{time.goodput:.0%} in training steps"]
    parts += [f"{seconds / time.wall_s:.0%} {name}" for seconds, name in rest if seconds >= 0.005 * time.wall_s]
    return ", ".join(parts)


def _attempts(manifest: Mapping[str, Any]) -> list[str]:
    """The last of them, a line each."""
    found = []
    for one in (manifest.get("attempts") or [])[-ATTEMPTS:]:
        how = f"{one.get('strategy')} on {one.get('size')} rank{'s' * (one.get('size') != 1)}"
        found.append(f"{one['attempt']}: from step {one.get('first_step', 0)}, {how}: {one.get('ended', 'not ended')}")
    return found
