"""How a model is to write: options that the verbs share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.engine.generate import How


def add(parser: argparse.ArgumentParser, *, usual: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help=f"the most tokens of a reply ({usual}, or what the model has room for)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw of the likeliest tokens that make up this share (1)")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw of the K likeliest tokens (0: of all)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="ends a reply, and is not part of it; may be given several times")  # fmt: skip
    parser.set_defaults(usual=usual)


def problems(args: argparse.Namespace) -> list[str]:
    found = []
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        found.append(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        found.append(f"--temperature {args.temperature:g}: must be at least 0")
    if not 0 < args.top_p <= 1:
        found.append(f"--top-p {args.top_p:g}: must be above 0, and at most 1")
    if args.top_k < 0:
        found.append(f"--top-k {args.top_k}: must be at least 0")
    if args.seed < 0:
        found.append(f"--seed {args.seed}: must be at least 0")
    if "" in args.stop:
        found.append("--stop '': is in every text; give at least one character")
    if args.temperature == 0 and (args.top_p != 1 or args.top_k):
        found.append("--temperature 0: takes the likeliest token, so --top-p and --top-k would do nothing; give a "
                     "temperature above 0, or leave them out")  # fmt: skip
    return found


def how(args: argparse.Namespace) -> How:
    from dtrain.engine.generate import How

    return How(max_new_tokens=args.max_new_tokens, usual=args.usual, temperature=args.temperature, top_p=args.top_p,
               top_k=args.top_k, stop=tuple(args.stop))  # fmt: skip
