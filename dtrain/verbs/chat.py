"""Talk with a model: it sees the conversation so far. /reset begins anew, /exit ends; Ctrl-C stops a reply."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any, final

from dtrain.errors import ModelError, UserError
from dtrain.verbs import _model, _sampling

if TYPE_CHECKING:
    from dtrain.engine.generate import Writer
    from dtrain.engine.loaded import Loaded

_COMMANDS = {"/reset": "forget what was said", "/exit": "end"}


def add(parser: argparse.ArgumentParser) -> None:
    _model.add(parser)
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument("--debug", action="store_true", help="show the text that the model is given, and its tokens")
    _sampling.add(parser, usual=512)


def run(args: argparse.Namespace) -> int:
    if problems := _sampling.problems(args):
        raise UserError.of(problems)
    loaded = _model.find(args).load(args.dtype, writes=True)
    if not loaded.tokenizer.has_chat:
        raise ModelError(f"{loaded.folder}: its tokenizer has no chat template, so it cannot chat; `dtrain generate` "
                         f"goes on from plain text")  # fmt: skip
    from dtrain.engine.generate import Writer

    _Chat(loaded, Writer(loaded, _sampling.how(args), seed=args.seed), args).talk()
    return 0


@final
class _Chat:
    def __init__(self, loaded: Loaded, writer: Writer, args: argparse.Namespace) -> None:
        self._loaded, self._writer, self._debug = loaded, writer, args.debug
        self._before = [{"role": "system", "content": args.system}] if args.system else []
        self._said: list[dict[str, Any]] = []

    def talk(self) -> None:
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines by it
            print("; ".join(f"{name}: {what}" for name, what in _COMMANDS.items()))
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/exit or Ctrl-D ends")
                continue
            if not terminal:
                print(line)  # what was typed into a pipe is seen nowhere else
            if line == "/exit":
                return
            if line == "/reset":
                self._said.clear()
                print("(a new conversation)")
            elif re.fullmatch(r"/\w+", line):
                print(f"{line}: no such command; there are: {', '.join(_COMMANDS)}")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        messages = [*self._before, *self._said, {"role": "user", "content": line}]
        try:
            ids = self._writer.prompt(messages)
        except UserError as error:
            print(f"(not said: {error}" + ("; or /reset)" if self._said else ")"), flush=True)
            return
        if self._debug:
            tokens = " ".join(map(str, ids))
            print(f"--- the model is given\n{self._loaded.tokenizer.decode(ids)}\n--- {len(ids)} tokens: {tokens}\n---")
        pieces: list[str] = []

        def heard(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            (reply,) = self._writer.write([ids], heard)
            end = "" if reply.finish == "stop" else f" (no end after {reply.num_tokens:,} tokens)"
        except KeyboardInterrupt:
            end = " (stopped)"
        print(end, flush=True)
        self._said = [*messages[len(self._before) :], {"role": "assistant", "content": "".join(pieces)}]
