"""One rank of a run; started by a launcher, never by hand."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--plugin", action="append", default=[])


def run(args: argparse.Namespace) -> int:
    from dtrain.engine.worker import work

    work(args.run_dir, plugins=args.plugin)
    return 0
