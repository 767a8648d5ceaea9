"""The command line: finds the verb, and turns how it ended into an exit code.

A verb is a module of `dtrain.verbs` with a docstring, of which the first line is its help, `add(parser)`, and
`run(args) -> int`. It is imported when it is typed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import pkgutil
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import dtrain
import dtrain.verbs
from dtrain.errors import DtrainError, UserError
from dtrain.verbs._report import report

MOST_COLUMNS = 120
"""Of the help, on a terminal that has more."""

INTERNAL = ("node", "worker")
"""Started by launchers, never typed."""

OWN_HELP = ("launch", "plan", "rehearse")
"""Those whose help lists all that can be chosen."""

USUAL = {"train": "launch", "run": "launch", "finetune": "launch", "fit": "launch", "resume": "launch",
         "merge": "export", "infer": "generate", "inference": "generate", "predict": "generate", "evaluate": "eval",
         "test": "eval", "preprocess": "data", "list": "runs", "status": "runs", "check": "doctor"}  # fmt: skip
"""What other tools call a verb."""


def run(argv: Sequence[str]) -> int:  # noqa: PLR0911 - one for each way to end
    """Exit code of `dtrain <argv>`: 0 done, 2 the user's input, 3 a rank failed, 75 stopped early on purpose."""
    verbs = [m.name for m in pkgutil.iter_modules(dtrain.verbs.__path__) if not m.name.startswith("_")]
    shown = [verb for verb in verbs if verb not in INTERNAL]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(shown))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"dtrain {dtrain.__version__}")
        return 0
    verb = argv[0]
    if verb not in verbs:
        close = [USUAL[verb]] if verb in USUAL else get_close_matches(verb, shown, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        return report(UserError(f"{verb}: no such verb; {hint}there are: {', '.join(shown)}"))
    module = importlib.import_module(f"dtrain.verbs.{verb}")
    parser = _Parser(prog=f"dtrain {verb}", description=module.__doc__, add_help=verb not in OWN_HELP,
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    try:
        module.add(parser)
        # Overrides and options in any order; argparse can do that only where there are no verbs within the verb.
        parse = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
        return int(module.run(parse(argv[1:])))
    except DtrainError as error:
        return report(error)
    except PermissionError as error:
        if verb in INTERNAL or error.filename is None:
            raise
        return report(UserError(f"{error.filename}: {error.strerror}; it is somebody else's, or closed: have it opened "
                                f"for you, or name another place"))  # fmt: skip
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone, as in `dtrain runs ls | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        # What may be left out is no part of what is required, though argparse says so.
        message = message.replace(", KEY=VALUE", "")
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def _help(verbs: Sequence[str]) -> str:
    lines = ["dtrain: fine-tune and pre-train language models; the same model whatever the parallelism.", "",
             "usage: dtrain VERB ...", ""]  # fmt: skip
    width = max(map(len, verbs))
    columns = min(MOST_COLUMNS, shutil.get_terminal_size().columns)
    for verb in verbs:
        lines += textwrap.wrap(_summary(verb), columns, initial_indent=f"  {verb:<{width}}  ",
                               subsequent_indent=" " * (width + 4))  # fmt: skip
    lines += ["", "Start with:  dtrain launch +strategy=zero3 launcher.procs=2", "More on one: dtrain VERB --help"]
    return "\n".join(lines)


def _summary(verb: str) -> str:
    """First line of a verb's docstring, read without importing it."""
    source = (Path(dtrain.verbs.__path__[0]) / f"{verb}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
