"""What `launch` and `plan` share: overrides in Hydra's manner, and a help that lists what can be chosen."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path

from dtrain.config.compose import choices, conf_dir


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path, default=None, metavar="DIR",
                        help="your own groups and choices, beside ours")  # fmt: skip


def help_text(parser: argparse.ArgumentParser, config_dir: Path | None) -> str:
    """The verb's options, every group with its choices, and every key with its default."""
    lines = [parser.description or "", "", parser.format_usage().strip(), ""]
    lines += [f"  {', '.join(action.option_strings):<22} {action.help}"
              for action in parser._actions if action.option_strings and action.help]  # fmt: skip
    lines += ["", "Groups, chosen by group=choice; `dtrain config explain GROUP` says what each choice is:", ""]
    found = choices(config_dir)
    width = max(map(len, found))
    columns = min(110, shutil.get_terminal_size().columns)
    for group, names in found.items():
        lines += textwrap.wrap(", ".join(names), columns, initial_indent=f"  {group:<{width}}  ",
                               subsequent_indent=" " * (width + 4))  # fmt: skip
    lines += [
        "",
        "Keys, set by key=value (`dtrain config explain KEY` tells more; -m runs key=a,b for each value):",
        "",
    ]
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    lines += [f"  {line}".rstrip() for line in text[text.index("\nrun:") + 1 :].rstrip().splitlines()]
    return "\n".join(lines) + "\n"
