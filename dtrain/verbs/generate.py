"""Let a model write: from a run's export, a model's folder, or an adapter with its model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.config import asked as _asked
from dtrain.errors import DataError, UserError
from dtrain.verbs import _model, _sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.engine.generate import Reply, Writer

_BATCH = 8


def add(parser: argparse.ArgumentParser) -> None:
    _model.add(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="the text to go on from; may be given several times")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="a prompt is what a user says; use the chat template")
    parser.add_argument("--in", dest="source", type=Path, metavar="FILE.jsonl",
                        help='rows of {"prompt": ...} or {"messages": [...]}')  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the same rows with `generated`; a new file")
    parser.add_argument("--batch", type=int, default=_BATCH, metavar="N", help=f"prompts at a time ({_BATCH})")
    _sampling.add(parser, usual=64)


def run(args: argparse.Namespace) -> int:
    if problems := [*_problems(args), *_sampling.problems(args)]:
        raise UserError.of(problems)
    named = _model.find(args)
    asked = _asked.read(args.source, chat=args.chat, option="--in ") if args.source else [
        _asked.Asked("--prompt", {}, [{"role": "user", "content": text}] if args.chat else text) for text in args.prompt
    ]  # fmt: skip
    loaded = named.load(args.dtype, writes=True)
    from dtrain.engine.generate import Writer

    writer = Writer(loaded, _sampling.how(args), seed=args.seed)
    prompts = _encoded(writer, asked)
    if args.source:
        return _to_file(writer, asked, prompts, args)
    if len(prompts) == 1:
        if not args.chat:
            print(args.prompt[0], end="", flush=True)
        (reply,) = writer.write(prompts, lambda piece: print(piece, end="", flush=True))
        print()
        _remark([reply])
        return 0
    replies: list[Reply] = []
    for start in range(0, len(prompts), args.batch):
        part = slice(start, start + args.batch)
        for text, reply in zip(args.prompt[part], writer.write(prompts[part]), strict=True):
            print(f"> {text}\n{reply.text}\n" if args.chat else f"{text}{reply.text}\n", flush=True)
            replies.append(reply)
    _remark(replies)
    return 0


def _problems(args: argparse.Namespace) -> list[str]:
    found = []
    if bool(args.prompt) == (args.source is not None):
        found.append("--prompt or --in: give one of the two, what to go on from")
    if (args.source is None) != (args.out is None):
        found.append("--in and --out: the one without the other; give both, or neither")
    if "" in args.prompt:
        found.append("--prompt '': is empty; give at least one character")
    if args.out is not None and args.out.exists():
        found.append(f"--out {args.out}: is there already; name a new file")
    elif args.out is not None and not args.out.absolute().parent.is_dir():
        found.append(f"--out {args.out}: there is no folder {args.out.parent}; make it, or choose another")
    if args.batch < 1:
        found.append(f"--batch {args.batch}: must be at least 1")
    return found


def _encoded(writer: Writer, asked: Sequence[_asked.Asked]) -> list[list[int]]:
    """All prompts, before the first is answered. Raises UserError with what is wrong with each."""
    prompts, problems = [], []
    for one in asked:
        try:
            prompts.append(writer.prompt(one.prompt, one.tools))
        except UserError as error:
            problems.append(f"{one.place}: {error}")
    if problems:
        raise DataError.of(dict.fromkeys(problems))
    return prompts


def _to_file(writer: Writer, asked: Sequence[_asked.Asked], prompts: Sequence[list[int]],
             args: argparse.Namespace) -> int:  # fmt: skip
    replies: list[Reply] = []
    with args.out.open("x", encoding="utf-8") as out:
        for start in range(0, len(prompts), args.batch):
            part = slice(start, start + args.batch)
            for one, reply in zip(asked[part], writer.write(prompts[part]), strict=True):
                row = {**one.row, **dict(zip(_asked.ADDED, (reply.text, reply.finish, reply.num_tokens), strict=True))}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                replies.append(reply)
            out.flush()
            _model.say(f"{len(replies):,} of {len(asked):,} prompts")
    print(f"wrote {args.out}: {len(replies):,} rows")
    _remark(replies)
    return 0


def _remark(replies: Sequence[Reply]) -> None:
    """Say which replies came to no end."""
    cut = [reply for reply in replies if reply.finish == "length"]
    if not cut:
        return
    which = "the reply" if len(replies) == 1 else f"{len(cut):,} of {len(replies):,} replies"
    most = max(reply.num_tokens for reply in cut)
    _model.say(f"[{which} came to no end after {most:,} tokens; --max-new-tokens says how many there may be]")
