"""Look at the rows that a launch would train on, measure or check them, or only prepare them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import UserError
from dtrain.verbs._data_policy import OPTIONS, judge, limit
from dtrain.verbs._data_rows import Part, check_target, open_rows, write

if TYPE_CHECKING:
    from dtrain.data.rows import Row
    from dtrain.verbs._data_preview import Shown
    from dtrain.verbs._data_rows import Opened

_ROWS = 3
_VERBS = {
    "preview": "some rows, token by token, exactly as they are trained on",
    "stats": "what is in them: tokens, lengths, what was cut or left out, duplicates",
    "check": "exit code 1 where they break one of the limits",
    "build": "prepare the rows into the cache, and nothing else",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Flat, so that overrides and options may stand in any order, as with `launch`."""
    told = "; ".join(f"{name}: {text}" for name, text in _VERBS.items())
    parser.add_argument("verb", choices=list(_VERBS), metavar="|".join(_VERBS), help=told)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the same as for `dtrain launch`")
    parser.add_argument("--config-dir", "-cd", type=Path, default=None, metavar="DIR",
                        help="your own groups and choices, beside ours")  # fmt: skip
    preview = parser.add_argument_group("preview")
    which = preview.add_mutually_exclusive_group()
    which.add_argument("--rows", type=int, metavar="N", help=f"the first N rows ({_ROWS})")
    which.add_argument("--row", type=int, metavar="I", help="only row I, counted from 0")
    preview.add_argument("--eval", action="store_true", default=None, help="of those that are held out")
    preview.add_argument("--ids", action="store_true", default=None, help="each token with its place and id")
    how = preview.add_mutually_exclusive_group()
    how.add_argument("--color", action="store_true", default=None,
                     help="colours though this is no terminal; else marks are around what is trained")  # fmt: skip
    how.add_argument("--html", type=Path, metavar="FILE", help="write it as a page for a browser")
    stats = parser.add_argument_group("stats")
    stats.add_argument("--json", action="store_true", default=None, help="one JSON object; the rest goes to stderr")
    stats.add_argument("--png", type=Path, metavar="FILE", help="draw the lengths of the documents")
    check = parser.add_argument_group("check", "each limit a share, such as 1%, or a number")
    for option, (standard, what) in OPTIONS.items():
        check.add_argument(option, type=limit, metavar="LIMIT", help=f"{what} ({standard})".replace("%", "%%"))
    groups = {"preview": preview, "stats": stats, "check": check}
    parser.set_defaults(options={verb: _options(group) for verb, group in groups.items()})


def _options(group: argparse._ArgumentGroup) -> dict[str, str]:
    """Where each option of a verb is stored, and its name."""
    return {action.dest: action.option_strings[0] for action in group._group_actions}


def run(args: argparse.Namespace) -> int:
    foreign = [f"{option}: is not for `dtrain data {args.verb}`, but for `dtrain data {verb}`"
               for verb, options in args.options.items() if verb != args.verb
               for dest, option in options.items() if getattr(args, dest) is not None]  # fmt: skip
    if foreign:
        raise UserError.of(foreign)
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {"preview": _preview, "stats": _stats, "check": _check,
                                                            "build": _build}  # fmt: skip
    return verbs[args.verb](args)


def _say(line: str) -> None:
    print(line, flush=True)


def _stats(args: argparse.Namespace) -> int:
    from dtrain.verbs import _data_plot, _data_stats

    check_target("--png", args.png)
    opened = open_rows(args.overrides, args.config_dir, _remark if args.json else _say)
    stats = _data_stats.measure(opened)
    if args.json:
        print(json.dumps(_data_stats.as_dict(stats, opened.notes)))
    else:
        print("\n".join(_data_stats.text(stats)))
    if args.png is not None:
        write("--png", args.png, _data_plot.draw_lengths(stats))
        (_remark if args.json else _say)(f"wrote {args.png}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from dtrain.verbs import _data_stats

    typed = {args.options["check"][dest]: getattr(args, dest) for dest in args.options["check"]}
    limits = {option: typed[option] or limit(standard) for option, (standard, _) in OPTIONS.items()}
    opened = open_rows(args.overrides, args.config_dir, _say)
    verdicts = list(judge(_data_stats.measure(opened), limits))
    for verdict in verdicts:
        print(verdict.line)
    broken = sum(verdict.broken for verdict in verdicts)
    print(f"{broken} of {len(verdicts)} limits broken" if broken else "all limits kept")
    return 1 if broken else 0


def _remark(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _build(args: argparse.Namespace) -> int:
    opened = open_rows(args.overrides, args.config_dir, _say)
    print(f"rows: {opened.prepared.dir}")
    return 0


def _preview(args: argparse.Namespace) -> int:
    from dtrain.verbs import _data_html, _data_preview

    check_target("--html", args.html)
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows {args.rows}: must be at least 1")
    opened = open_rows(args.overrides, args.config_dir, _say)
    shown = _shown(opened, "eval" if args.eval else "train", rows=args.rows, row=args.row)
    if args.html is not None:
        page = _data_html.page(shown, opened.notes, ids=bool(args.ids))
        write("--html", args.html, page.encode())
        print(f"wrote {args.html}: {len(shown)} row{'s' if len(shown) > 1 else ''}")
        return 0
    color = bool(args.color) or sys.stdout.isatty()
    for line in _data_preview.lines(shown, color=color, ids=bool(args.ids)):
        print(line)
    return 0


def _shown(opened: Opened, part: Part, *, rows: int | None, row: int | None) -> list[Shown]:
    """The rows that were asked for. Raises UserError where there are none."""
    from dtrain.verbs._data_preview import sample_title, title

    if opened.prepared.streams and part == "train":
        numbers = range(rows or _ROWS) if row is None else range(row, row + 1)
        if row is not None and row < 0:
            raise UserError(f"--row {row}: samples are counted from 0")
        samples = opened.samples(numbers.stop)
        return [_show(opened, sample_title(i, samples[i]), samples[i]) for i in numbers]
    store = opened.store(part)
    if not len(store):
        raise UserError("--eval: no rows are held out; set eval.fraction above 0, or leave --eval out")
    if row is not None and not 0 <= row < len(store):
        raise UserError(f"--row {row}: there are rows 0 to {len(store) - 1}")
    chosen = store.first(rows or _ROWS).tolist() if row is None else [row]
    return [_show(opened, title(i, store, part, store.row(i)), store.row(i)) for i in chosen]


def _show(opened: Opened, title: str, row: Row) -> Shown:
    from dtrain.verbs._data_pieces import documents
    from dtrain.verbs._data_preview import Shown

    tokenizer, prepared = opened.tokenizer(), opened.prepared
    pad = f"token {prepared.pad_id}, {tokenizer.decode([prepared.pad_id])!r}"
    short = prepared.max_length - len(row.tokens)
    padding = f"{pad}, to the longest row of its micro-batch; {short:,} tokens below dataset.max_length"
    return Shown(title, row, list(documents(row, tokenizer)), padding)
