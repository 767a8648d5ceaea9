"""Show everything that `launch` would decide: batch split, memory per rank by strategy, precision, steps."""

from __future__ import annotations

import argparse

from dtrain.verbs import _overrides


def add(parser: argparse.ArgumentParser) -> None:
    _overrides.add(parser)
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    from dtrain.plan.describe import describe
    from dtrain.plan.propose import propose

    if args.help:
        print(_overrides.help_text(args.parser, args.config_dir), end="")
        return 0
    proposal = propose(args.overrides, args.config_dir, elsewhere=True)
    print(describe(proposal.config, proposal.plan))
    return 0
