"""Look at the configuration: what a command line comes to, what a key means, every key there is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.config.schema import Config


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|explain|schema")
    show = verbs.add_parser("show", help="the composed and checked configuration, as YAML")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    explain = verbs.add_parser("explain", help="what a key means, its type, its default and its value")
    explain.add_argument(
        "key", metavar="KEY", help="as in train.grad_clip; a group, as in strategy; a choice, as in tuning.lora"
    )
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
    from dtrain.config.compose import dump_yaml
    from dtrain.config.explain import schema_lines
    from dtrain.plan.propose import configure

    config, _ = configure(args.overrides, args.config_dir)
    if args.verb == "show":
        print(dump_yaml(frozen.to_plain(config)), end="")
    elif args.verb == "schema":
        print("\n".join(schema_lines(config)))
    else:
        print("\n".join(_explain(args.key, config, args.config_dir)))
    return 0


def _explain(key: str, config: Config, extra: Path | None) -> list[str]:
    """Of a key, a section, a group, or one of its choices as `objective.dpo`. Raises ConfigError."""
    from dtrain.config.compose import choices, nearest
    from dtrain.config.explain import group_lines, keys, of_choice, with_key
    from dtrain.config.names import NAMES

    known, groups = keys(config), choices(extra)
    if key in known:
        return [known[key].text()]
    if key in groups:
        inside = [one for one in known if one.startswith(key + ".")]
        return [f"{key}: choose one of", *group_lines(key, groups[key], extra),
                "keys of the one chosen now: " + (", ".join(inside) or "none")]  # fmt: skip
    section = [known[one].line() for one in known if one.startswith(key + ".")]
    if section:
        return section
    group, _, rest = key.partition(".")
    if rest in groups.get(group, ()):
        return [*group_lines(group, [rest], extra),
                *(one.line() for one in of_choice(group, rest, extra, config.plugins).values())]  # fmt: skip
    if others := with_key(key, extra, config.plugins):
        first, one = next(iter(others.items()))
        return [
            one.text(),
            "",
            f"of {', '.join(f'{group}={choice}' for choice in others)}; the value is that of {first}",
        ]
    near = nearest(key, list(known)) or (f"; here it is {NAMES[key]}" if key in NAMES else "")
    raise ConfigError(f"{key}: no such key{near}; `dtrain config schema` lists them all")
