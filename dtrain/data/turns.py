"""Which characters of a rendered conversation a message of the assistant, or of anyone, is learned by.

A turn of the assistant begins where the generation prompt ends, since there a model begins to write, and ends with the
token that ends it, since there generation stops: white space after it is the template's. Where the text of the first
messages is the beginning of the text of all, this is found by rendering the first ones alone. Where it is not, as in
templates that take the thinking out of earlier turns, marks are put into the messages, and the text around them is
compared. What cannot be found for certain is refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, final

from dtrain.data.chat import ChatTemplate, Messages, Span, Tools
from dtrain.datasets.badrows import BadRowError
from dtrain.errors import DataError

_SALT = f"Qz{os.urandom(8).hex()}"
"""Of letters and digits, so that no filter of a template changes it; content cannot hold it, as it differs in each
process."""
_MARK = re.compile(_SALT + r"([0-9]+)z")


@final
class Turns:
    """Of one template."""

    def __init__(self, template: ChatTemplate, special: Sequence[str], stops: Sequence[str]) -> None:
        """`special`: all special tokens, any of which may end a turn; `stops`: those at which generation stops."""
        self.template = template
        self._special, self._stops = tuple(special), tuple(stops)

    def spans(self, messages: Messages, learned: Sequence[bool], tools: Tools = None) -> tuple[str, list[Span]]:
        """The text, and the ascending character ranges of the learned messages, each with what ends its turn.

        Raises BadRowError, naming the message, where they cannot be told from the rest.
        """
        text, marks = self.template.render_marked(messages, tools)
        rendered = _Rendered.of(self.template, messages, tools, text, self._surplus)
        rendered.check_all_there()
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found: list[Span] = []
        for i, is_learned in enumerate(learned):
            if not is_learned:
                continue
            if i not in said:
                found.append(self._content(rendered, i))
            elif self._agrees and len(marks) == len(said):
                found.append(self._closed(rendered, i, marks[said.index(i)]))
            else:
                found += self._turn(rendered, i, marks, said)
        found = sorted((start, end) for start, end in found if start < end)
        if any(end > start for (_, end), (start, _) in pairwise(found)):
            raise BadRowError("messages cannot be masked: the chat template writes one within another")
        return text, found

    @property
    def samples(self) -> list[str]:
        """Small conversations, with the prompt for a next turn."""
        return [self.template.render(each.messages, each.tools, add_generation_prompt=True) for each in self._probes]

    def ends(self) -> Iterator[str]:
        """The special tokens that end a turn of the assistant in the small conversations."""
        for rendered in self._probes:
            for i in rendered.said():
                region = self._region(rendered, i)
                if region and self._ends(rendered, i, *region):
                    turn = rendered.text[slice(*region)]
                    yield max(filter(turn.endswith, self._special), key=len)

    def notes(self) -> Iterator[str]:
        """What a user should know of how this template is learned, found by small conversations."""
        turns = [(rendered, i, self._region(rendered, i)) for rendered in self._probes for i in rendered.said()]
        if any(region and rendered.strict(i) is None for rendered, i, region in turns):
            yield ("it writes the same messages in another way once others follow, such as turns without their "
                   "thinking; each turn is learned as it stands in the whole conversation")  # fmt: skip
        if any(region and not self._ends(rendered, i, *region) for rendered, i, region in turns):
            yield ("no special token ends a turn, so a model does not learn to stop; template.ends names the tokens "
                   "that do, or choose another with template=")  # fmt: skip
        if self.template.marked and not self._agrees:
            yield ("its generation marks and the turns of the assistant are not the same characters; what is in both "
                   "is learned, with the token that ends a turn")  # fmt: skip

    def _turn(self, rendered: _Rendered, i: int, marks: list[Span], said: list[int]) -> list[Span]:
        region = self._region(rendered, i)
        if region is None:
            span = self._closed(rendered, i, marks[said.index(i)]) if len(marks) == len(said) else None
            if span is not None and self._ends(rendered, i, *span):
                return [span]
            raise BadRowError(f"message {i + 1} cannot be masked: {rendered.why(i)}; choose another with template=, or "
                              f"mark in this one what the assistant writes, with {{% generation %}}"
                              + "; objective.train_on=last_turn needs only the last" * (i < said[-1]))  # fmt: skip
        if not self.template.marked:
            return [region]
        start, end = region
        inside = [(max(start, a), min(end, b)) for a, b in marks if a <= end and b >= start]
        if not inside:
            raise BadRowError(f"message {i + 1}: the generation marks of the chat template leave it out")
        rest = rendered.text[inside[-1][1] : end].strip()
        if not rest or rest in self._special:
            inside[-1] = (inside[-1][0], end)
        return inside

    def _region(self, rendered: _Rendered, i: int) -> Span | None:
        if self._surplus is None and i + 1 == len(rendered.messages):
            return None
        region = rendered.strict(i) or rendered.synced(i, self._special)
        return None if region is None else self._closed(rendered, i, region)

    def _closed(self, rendered: _Rendered, i: int, span: Span) -> Span:
        """With the token that ends the turn, and without the white space after it: generation has stopped before."""
        start, end = span
        if self._ends(rendered, i, start, end):
            return start, start + len(rendered.text[start:end].rstrip())
        after = rendered.text[end:]
        stop = next((stop for stop in self._stops if after.lstrip().startswith(stop)), None)
        return span if stop is None else (start, end + after.index(stop) + len(stop))

    def _ends(self, rendered: _Rendered, i: int, start: int, end: int) -> bool:
        """Whether a special token ends this text, one that is not part of what the message says."""
        if not rendered.text[start:end].rstrip().endswith(self._special):
            return False
        if not _content(rendered.messages[i]).rstrip().endswith(self._special):
            return True
        return rendered.text[rendered.ends_of_content(i).get(i, start) : end].rstrip().endswith(self._special)

    def _content(self, rendered: _Rendered, i: int) -> Span:
        """Of a message of someone else: its content, and a token right after it at which generation stops."""
        span = rendered.content(i)
        if span is None:
            raise BadRowError(f"message {i + 1} cannot be masked: the chat template changes what it says")
        start, end = span
        stop = next((stop for stop in self._stops if rendered.text.startswith(stop, end)), "")
        return start, end + len(stop)

    @cached_property
    def _agrees(self) -> bool:
        """Whether the marks of the template are the turns, wherever it was tried: then they need not be looked for."""
        if not self.template.marked:
            return False
        for rendered in self._probes:
            _, marks = self.template.render_marked(rendered.messages, rendered.tools)
            said = rendered.said()
            closed = [self._closed(rendered, i, span) for i, span in zip(said, marks, strict=False)]
            if len(marks) != len(said) or closed != [self._region(rendered, i) for i in said]:
                return False
        return bool(self._probes)

    @cached_property
    def _surplus(self) -> str | None:
        """What the template writes after the last turn and not after others, such as a token that ends the text; None
        where it is more than that, so that it is not known how far the turn goes.
        """
        try:
            text = self.template.render(_TWO_TURNS)
        except DataError:
            return ""
        rendered = _Rendered.of(self.template, _TWO_TURNS, None, text, None)
        ends = rendered.ends_of_content(1, 3)
        if len(ends) < 2:
            return ""
        before, last = text[ends[1] :].lstrip(), text[ends[3] :].strip()
        if before.startswith(last):
            return ""
        end = max((token for token in self._special if last.startswith(token) and before.startswith(token)), key=len,
                  default="")  # fmt: skip
        rest = last[len(end) :].lstrip()
        return rest if end and rest in self._special else None

    @cached_property
    def _probes(self) -> list[_Rendered]:
        found = []
        for messages, tools in _PROBES:
            if tools and not ("tools" in self.template.variables and "tool_calls" in self.template.words):
                continue
            try:
                text = self.template.render(messages, tools)
            except DataError:  # a template may have no word for a role or an order; the rows will tell
                continue
            found.append(_Rendered.of(self.template, messages, tools, text, self._surplus))
        return found


@dataclasses.dataclass(frozen=True)
class _Rendered:
    template: ChatTemplate
    messages: Messages
    tools: Tools
    text: str
    """Up to the end of the last turn."""
    surplus: str
    """What stands only after the last turn."""

    @classmethod
    def of(cls, template: ChatTemplate, messages: Messages, tools: Tools, text: str, surplus: str | None) -> _Rendered:
        return cls(template, messages, tools, text.removesuffix(surplus or ""), surplus or "")

    def said(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def check_all_there(self) -> None:
        """Raises BadRowError for a message that the template leaves out."""
        for i, message in enumerate(self.messages):
            content = _content(message).strip()
            if content and content not in self.text and not self._writes(i):
                raise BadRowError(f"message {i + 1} is not in the text: the chat template leaves out what role "
                                  f"`{message['role']}` says; choose another with template=")  # fmt: skip

    def strict(self, i: int) -> Span | None:
        """What message i adds to the text, where the messages up to it render to the beginning of the text."""
        before = self._try(self.messages[:i], prompt=True)
        after = self.text if i + 1 == len(self.messages) else self._try(self.messages[: i + 1])
        if before is None or after is None or not (after.startswith(before) and self.text.startswith(after)):
            return None
        return len(before), len(after)

    def synced(self, i: int, special: tuple[str, ...]) -> Span | None:
        """The same where only what stands around message i is alike, whatever became of earlier ones."""
        around = range(max(0, i - 1), i + 1)
        marks = self._marks(self._with_marks(*around))
        header = self._tail(i, prompt=True)
        if set(marks) != set(around) or header is None:
            return None
        start = (marks[i - 1] if i else 0) + len(header)
        if not self.text.startswith(header, start - len(header)) or start > marks[i]:
            return None
        footer = self._tail(i + 1, prompt=False)
        if footer is None:
            return None
        if not self.text.startswith(footer, marks[i]):  # the white space after a turn may depend on what follows
            footer = footer.rstrip()
            if not (self.text.startswith(footer, marks[i]) and footer.endswith(special)):
                return None
        return start, marks[i] + len(footer)

    def why(self, i: int) -> str:
        """What keeps message i from being found."""
        header = self._tail(i, prompt=True)
        if header is None:
            return "the chat template refuses the messages before it alone, or changes what they say"
        before = self.ends_of_content(i - 1).get(i - 1) if i else 0
        if before is None:
            return "the chat template changes what the message before it says"
        if not self.text.startswith(header, before):
            return f"the chat template asks for an answer by {header[-40:]!r}, and writes the turn without that"
        return "the chat template writes more, or something else, at the end of the last turn than of those before"

    def ends_of_content(self, *at: int) -> dict[int, int]:
        """Where messages end, or their calls; without those that the template does not write as they are."""
        return self._marks(self._with_marks(*at))

    def content(self, i: int) -> Span | None:
        """Where the content of message i stands, without white space at its ends that the template takes away."""
        content = _content(self.messages[i])
        left = len(content) - len(content.lstrip())
        right = max(left, len(content.rstrip()))
        for start in dict.fromkeys((0, left)):
            for end in dict.fromkeys((len(content), right)):
                marked = content[:start] + _mark(0) + content[start:end] + _mark(1) + content[end:]
                marks = self._marks([*self.messages[:i], {**self.messages[i], "content": marked},
                                     *self.messages[i + 1 :]])  # fmt: skip
                if len(marks) == 2 and marks[0] <= marks[1]:
                    return marks[0], marks[1]
        return None

    def _writes(self, i: int) -> bool:
        """Whether anything of the content of message i is in the text, rewritten as it may be."""
        only_content = {key: value for key, value in self.messages[i].items() if key != "tool_calls"}
        marked = _marked(only_content, i)["content"]
        text = self._try([*self.messages[:i], {**self.messages[i], "content": marked}, *self.messages[i + 1 :]])
        return text is not None and _mark(i) in text

    def _tail(self, num: int, *, prompt: bool) -> str | None:
        """What the first `num` messages alone have after the mark in the last of them."""
        plain = self._try(self.messages[:num], prompt=prompt)
        if num == 0 or plain is None:
            return plain
        marked = self._try(self._with_marks(num - 1)[:num], prompt=prompt)
        if marked is None or _MARK.sub("", marked) != plain or len(_MARK.findall(marked)) != 1:
            return None
        return _MARK.split(marked)[-1]

    def _marks(self, messages: Messages) -> dict[int, int]:
        """Where each mark in the messages stands in the text; none where marks change anything else."""
        marked = self._try(messages)
        if marked is None or _MARK.sub("", marked) != self.text:
            return {}
        found: dict[int, int] = {}
        before = 0
        for match in _MARK.finditer(marked):
            if int(match[1]) in found:  # twice in the text
                return {}
            found[int(match[1])] = match.start() - before
            before += len(match[0])
        return found

    def _with_marks(self, *at: int) -> list[Mapping[str, Any]]:
        return [_marked(message, i) if i in at else message for i, message in enumerate(self.messages)]

    def _try(self, messages: Messages, *, prompt: bool = False) -> str | None:
        """Up to where the last of these messages ends, or with the prompt for another."""
        try:
            text = self.template.render(messages, self.tools, add_generation_prompt=prompt)
        except BadRowError:
            return None
        return text if prompt else text.removesuffix(self.surplus)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _mark(i: int) -> str:
    return f"{_SALT}{i}z"


def _marked(message: Mapping[str, Any], i: int) -> Mapping[str, Any]:
    """The message with a mark in it, which no template takes away or acts on: in the name of its last call, else at the
    end of what it says, where thinking is over and white space not begun.
    """
    if not message.get("tool_calls"):
        said = _content(message)
        content = said.rstrip()
        return {**message, "content": content + _mark(i) + said[len(content) :]}
    *calls, last = message["tool_calls"]
    if "function" in last:
        last = {**last, "function": {**last["function"], "name": last["function"]["name"] + _mark(i)}}
    else:
        last = {**last, "name": last["name"] + _mark(i)}
    return {**message, "tool_calls": [*calls, last]}


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


_ASKED, _MORE = _said("user", "alpha one"), _said("user", "gamma three")
_TOOL = {"type": "function", "function": {"name": "weigh", "description": "weighs", "parameters": {
    "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}  # fmt: skip
_CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"what": "delta"}}}
_TWO_TURNS = [_ASKED, _said("assistant", "beta two"), _MORE, _said("assistant", "delta four")]
_PROBES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    (_TWO_TURNS, None),
    ([_said("system", "zeta"), _ASKED, _said("assistant", "beta two")], None),
    ([_ASKED, _said("assistant", "<think>\nhm\n</think>\n\nbeta"), _MORE,
      _said("assistant", "<think>\nwell\n</think>\n\ndelta")], None),
    ([_ASKED, {"role": "assistant", "tool_calls": [_CALL]}, _said("tool", "12"), _said("assistant", "twelve")],
     [_TOOL]),
)  # fmt: skip
"""Small conversations of words that stand nowhere else."""
