"""A chat template: from messages to text, and which characters of it the assistant wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
# Around what the assistant wrote, while rendering; content cannot hold them, since they differ in each process.
_OPEN, _CLOSE = (f"\x02{os.urandom(8).hex()}{end}\x03" for end in "<>")


_MARKED = re.compile(r"{%[-+]?\s*generation\b")


@final
class ChatTemplate:
    """Renders as `transformers` does. Not trusted: it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], end_markers: Sequence[str], origin: str) -> None:
        """`special_tokens`: what `bos_token` and the like stand for there. `end_markers`: what may end a turn.

        Raises DataError, naming `origin`, where the template does not parse.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        # No `strftime_now`: a template that has today's date in it would make other rows tomorrow. Templates that ask
        # whether it is there fall back to a date of their own; others are told to.
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"model.path: the chat template in {origin} does not parse: line {error.lineno}: "
                            f"{error.message}; repair the template there") from error  # fmt: skip
        self._marked = _MARKED.search(source) is not None
        self._special_tokens = dict(special_tokens)
        self._end_markers = tuple(end_markers)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises BadRowError with what the template says."""
        return self._render(messages, prompt=add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and the character ranges that the assistant wrote, each with the marker that ends its turn.

        A template with `{% generation %}` says itself what they are. For any other, a turn is what it adds to the text
        rendered up to it and with the generation prompt. Raises BadRowError where neither is possible.
        """
        if self._marked:
            return _split_marks(self._render(messages, prompt=False))
        whole = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = whole if i + 1 == len(messages) else self.render(messages[: i + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRowError(
                    f"message {i + 1} cannot be masked: the chat template writes the messages before it in another way "
                    f"once it is there; mark the assistant's part of the template with {{% generation %}}"
                )
            spans.append((len(before), self._end_of_turn(whole, len(before), len(after))))
        return whole, spans

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Without the white space after the marker that ends a turn: generation has stopped before it."""
        turn = text[start:end].rstrip()
        return start + len(turn) if turn.endswith(self._end_markers) else end

    def _render(self, messages: Messages, *, prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadRowError(f"the chat template refuses these messages: {error}") from error


def _split_marks(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    head, *parts = marked.split(_OPEN)
    text = head
    for part in parts:
        inside, _, outside = part.partition(_CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it as they like
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # Not jinja's own, which escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
