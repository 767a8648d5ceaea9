"""What `launch` and `plan` share: overrides in Hydra's manner, and a help that lists what can be chosen."""

from __future__ import annotations

import argparse
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
    lines += ["", "Groups, chosen by group=choice (+group=choice does the same):", ""]
    found = choices(config_dir)
    width = max(map(len, found))
    lines += [_folded(f"  {group:<{width}}  ", names) for group, names in found.items()]
    lines += [
        "",
        "Keys, set by key=value (`dtrain config explain KEY` tells more; -m runs key=a,b for each value):",
        "",
    ]
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    lines += ["  " + line for line in text[text.index("\nrun:") + 1 :].rstrip().splitlines()]
    return "\n".join(lines) + "\n"


def _folded(head: str, names: list[str], width: int = 110) -> str:
    lines, line = [], head
    for i, name in enumerate(names):
        word = name + (", " if i + 1 < len(names) else "")
        if len(line) + len(word) > width:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += word
    return "\n".join([*lines, line])
