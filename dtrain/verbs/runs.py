"""List runs, or show one: state, progress, losses, where its logs are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import RunError
from dtrain.runs import RunDir, RunSummary, list_runs
from dtrain.verbs._table import lines, table


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|show")
    ls = verbs.add_parser("ls", help="every run of a folder, newest first")
    ls.add_argument("dir", nargs="?", type=Path, default=Path("runs"), help="where run folders are (runs)")
    ls.add_argument("--json", action="store_true", help="one JSON object a line")
    show = verbs.add_parser("show", help="one run in full")
    show.add_argument("run", type=Path, help="its folder, or its name in runs/")


def run(args: argparse.Namespace) -> int:
    if args.verb == "ls":
        return _ls(args.dir, as_json=args.json)
    return _show(find(args.run))


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
    rows = [("name", "state", "step", "loss", "strategy", "ranks", "started"), *map(_row, found)]
    print("\n".join(table(rows)))
    return 0


def _fields(one: RunSummary) -> Sequence[tuple[str, object]]:
    return [(name, getattr(one, name)) for name in one.__dataclass_fields__]


def _row(one: RunSummary) -> tuple[str, ...]:
    step = "-" if one.step is None else f"{one.step}/{one.steps or '?'}"
    loss = "-" if one.loss is None else f"{one.loss:.4f}"
    return (one.name, one.state, step, loss, one.strategy or "-", str(one.size or "-"), (one.started or "-")[:19])


def _show(run: RunDir) -> int:
    from dtrain.runs.listing import summary

    one, manifest, outcome = summary(run), run.read_manifest(), run.read_outcome()
    pairs: list[tuple[str, object]] = [
        ("run", run.path), ("state", one.state), ("step", f"{one.step or 0} of {one.steps or '?'}"),
        ("loss", "-" if one.loss is None else f"{one.loss:.4f}"), ("strategy", one.strategy), ("ranks", one.size),
        ("device", manifest.get("device")), ("started", one.started), ("attempts", one.attempts),
    ]  # fmt: skip
    result = manifest.get("result") or {}
    pairs += [(key.replace("_", " "), f"{value:.4f}") for key, value in result.items() if isinstance(value, float)]
    if outcome is not None and outcome.message:
        pairs.append(("outcome", f"{outcome.kind}: {outcome.message}"))
    git = manifest.get("git") or {}
    if git:
        pairs.append(("git", f"{git.get('commit', '')[:12]}{' with changes' if git.get('dirty') else ''}"))
    pairs += [("logs", run.attempt_dir(one.attempts - 1))] if one.attempts else []
    pairs += [("export", run.export)] if run.export.is_dir() else []
    print("\n".join(lines(pairs)))
    return 0
