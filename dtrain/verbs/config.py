"""Look at the configuration: what a command line comes to, what a key means, every key there is."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.errors import ConfigError


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|explain|schema")
    show = verbs.add_parser("show", help="the composed and checked configuration, as YAML")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    explain = verbs.add_parser("explain", help="what a key means, its type, its default and its value")
    explain.add_argument("key", metavar="KEY", help="as in train.grad_clip, or a group as in strategy")
    explain.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    verbs.add_parser("schema", help="every key of every group and choice").add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE"
    )
    for one in verbs.choices.values():
        one.add_argument(
            "--config-dir", "-cd", type=Path, default=None, metavar="DIR", help="your own groups and choices"
        )


def run(args: argparse.Namespace) -> int:
    from dtrain.config import frozen
    from dtrain.config.compose import choices, dump_yaml, nearest
    from dtrain.config.explain import keys, schema_lines
    from dtrain.plan.propose import configure

    config, _ = configure(args.overrides, args.config_dir)
    if args.verb == "show":
        print(dump_yaml(frozen.to_plain(config)), end="")
        return 0
    if args.verb == "schema":
        print("\n".join(schema_lines(config)))
        return 0
    known = keys(config)
    groups = choices(args.config_dir)
    if args.key in groups:
        print(f"{args.key}: choose one of {', '.join(groups[args.key])}")
        inside = [key for key in known if key.startswith(args.key + ".")]
        print("keys of the one chosen now: " + (", ".join(inside) or "none"))
        return 0
    if args.key not in known:
        sections = sorted({key.split(".")[0] for key in known})
        if args.key in sections:
            print("\n".join(known[key].line() for key in known if key.startswith(args.key + ".")))
            return 0
        raise ConfigError(
            f"{args.key}: no such key{nearest(args.key, list(known))}; `dtrain config schema` lists them all"
        )
    print(known[args.key].text())
    return 0
