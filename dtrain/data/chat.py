"""A chat template: from messages to text, as transformers renders it, in a sandbox."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtrain.config.compose import choices, group_choice
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
Span = tuple[int, int]
# Around what the template says the assistant wrote; content cannot hold them, since they differ in each process.
_OPEN, _CLOSE = (f"\x02{os.urandom(8).hex()}{end}\x03" for end in "<>")
_MARKED = re.compile(r"{%[-+]?\s*generation\b")
_OURS = {"train"}
"""Keys of a message that are for dtrain, not for the template."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that what was thought goes by; transformers fills the first from the others."""


@final
class ChatTemplate:
    """Not trusted: it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        """`special_tokens`: what `bos_token` and the like stand for there.

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
            tree = environment.parse(source)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"template: the one in {origin} does not parse: line {error.lineno}: {error.message}; "
                            f"repair it there, or choose another with template=") from error  # fmt: skip
        self.origin = origin
        self.marked = _MARKED.search(source) is not None
        """Whether it says itself, by `{% generation %}`, what the assistant wrote."""
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        """What it asks for from outside: `messages`, `tools`, `eos_token`."""
        self.words = {node.attr for node in tree.find_all(nodes.Getattr)} | {
            node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
        }
        """Keys that it may look for in messages, among other things: `tool_calls`, `reasoning_content`."""
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Messages, tools: Tools = None, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises BadRowError with what the template says, DataError for what it cannot."""
        return self._render(messages, tools, prompt=add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def render_marked(self, messages: Messages, tools: Tools = None) -> tuple[str, list[Span]]:
        """The text, and the character ranges between the template's own `{% generation %}` marks."""
        text, spans = "", []
        head, *parts = self._render(messages, tools, prompt=False).split(_OPEN)
        text = head
        for part in parts:
            inside, _, outside = part.partition(_CLOSE)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + outside
        return text, spans

    def _render(self, messages: Messages, tools: Tools, *, prompt: bool) -> str:
        shown = [_shown(message, i) for i, message in enumerate(messages)]
        self._check(shown, tools)
        try:
            return self._template.render(messages=shown, tools=tools or None, documents=None,
                                         add_generation_prompt=prompt, **self._special_tokens)  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            if isinstance(error, jinja2.UndefinedError) and "strftime_now" in str(error):
                raise DataError(f"template: the one in {self.origin} writes today's date, and other rows tomorrow; put "
                                f"a date there in a copy, and type template.file=COPY") from error  # fmt: skip
            raise BadRowError(f"the chat template refuses these messages: {error}") from error

    def _check(self, shown: Messages, tools: Tools) -> None:
        """Raises DataError for what the rows have and the template has no word for: it would be left out unseen."""
        for what, key, found in (
            ("tools", "tools", tools and "tools" not in self.variables),
            ("calls of tools", "tool_calls", "tool_calls" not in self.words and _any_has(shown, "tool_calls")),
            (_REASONING[0], _REASONING[0], not self.words & {*_REASONING} and _any_has(shown, _REASONING[0])),
        ):
            if found:
                names = [
                    each for each in choices()["template"] if key in group_choice("template", each).get("text", "")
                ]
                raise DataError(f"template: the rows have {what}, which the chat template in {self.origin} does not "
                                f"write; type {' or '.join(f'template={each}' for each in names)}, or leave them out "
                                f"of the rows")  # fmt: skip


def _any_has(messages: Messages, key: str) -> bool:
    return any(message.get(key) for message in messages)


def _shown(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    """A message as a template expects it: without keys that are null, the arguments of calls as mappings."""
    shown = {key: value for key, value in message.items() if value is not None and key not in _OURS}
    if "tool_calls" in shown:
        shown["tool_calls"] = [_call(call, i) for call in shown["tool_calls"]]
    thought = next((shown[key] for key in _REASONING if key in shown), None)
    return shown if thought is None else {"thinking": thought, **shown, "reasoning_content": thought}


def _call(call: Mapping[str, Any], i: int) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise BadRowError(f"message {i + 1}: the arguments of a call are not JSON: {error}") from error
    if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), dict):
        raise BadRowError(f"message {i + 1}: a call of a tool needs a name, and arguments as a mapping")
    return {"type": "function", **{key: call[key] for key in call if key != "name" and key != "arguments"},
            "function": function}  # fmt: skip


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
