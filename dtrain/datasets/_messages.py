"""Conversations as rows have them, under any usual names, to the one form that a chat template takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dtrain.datasets._values import filled, from_json, kind, listed, string
from dtrain.datasets.badrows import BadRowError
from dtrain.datasets.base import Messages, Tools

_CALL = "function_call"
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "助手"), "assistant"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""Names of roles in data, and what they are to a template; a call is what the assistant says."""
_FURTHER = ("name", "tool_call_id", "reasoning_content")
_KNOWN = {"role", "from", "content", "value", *_FURTHER, "tool_calls", "function_call", "train", "weight"}


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """How messages are written in these rows."""

    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names in the rows and what they are, besides ROLES and before them."""
    role: str | None = None
    """The key of a message's role, where it is another than the usual."""
    content: str | None = None

    def known(self, role: str) -> str:
        """Raises BadRowError."""
        found = self.roles.get(role) or ROLES.get(role) or ROLES.get(role.lower())
        if found is None:
            raise BadRowError(f"a role that is not known: `{role}`; say what it is, as in dataset.roles.tool={role} "
                              f"(or user, assistant, system, function_call, any role of the template)")  # fmt: skip
        return _CALL if ROLES.get(found) == _CALL else found

    def unused(self, message: Mapping[str, Any]) -> list[str]:
        return [key for key in message if key not in {*_KNOWN, self.role, self.content}]

    def role_of(self, message: Mapping[str, Any]) -> Any:
        return message.get(self.role or ("from" if "from" in message and "role" not in message else "role"))

    def _content_of(self, message: Mapping[str, Any]) -> Any:
        return message.get(self.content or ("value" if "value" in message and "content" not in message else "content"))

    def read(self, value: Any, name: str) -> Messages:
        """The messages in a column. What the assistant says and the call that it then makes are one message. Raises
        BadRowError.
        """
        value = from_json(value, f"`{name}`") if isinstance(value, str) and value.lstrip().startswith("[") else value
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            raise BadRowError(f"`{name}` is {kind(value)} instead of a list")
        if not value:
            raise BadRowError(f"`{name}` is empty")
        found: Messages = []
        for i, message in enumerate(value, start=1):
            one = self._message(message, i)
            before = found[-1] if found else {}
            if one.get("tool_calls") and one["content"] is None and before.get("role") == "assistant":
                before["tool_calls"] = [*before.get("tool_calls", []), *one["tool_calls"]]
            else:
                found.append(one)
        return found

    def _message(self, message: Any, number: int) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise BadRowError(f"message {number} is {kind(message)} instead of an object")
        role = self.role_of(message)
        if role is None:
            raise BadRowError(f"message {number} has no role: it has {listed(message)}; name the key by "
                              f"dataset.columns.role")  # fmt: skip
        content, where = self._content_of(message), f"message {number}"
        role = self.known(filled(role, f"the role of {where}"))
        if len(message) == 2 and type(content) is str and role != _CALL:  # as most are
            return {"role": role, "content": string(content, f"the content of {where}")}
        if role == _CALL:
            return {"role": "assistant", "content": None, "tool_calls": _calls(content, where)}
        found: dict[str, Any] = {"role": role, "content": None}
        calls = message.get("tool_calls") or message.get("function_call")
        if calls:
            found["tool_calls"] = _calls(calls, where)
        if content is not None or not calls:
            found["content"] = _content(content, where, role, message)
        for key in _FURTHER:
            if message.get(key) is not None:
                found[key] = string(message[key], f"`{key}` of {where}")
        train = message.get("train", message.get("weight"))
        if train is not None:
            if train not in (True, False):
                raise BadRowError(f"`train` or `weight` of {where} is neither true nor false, 1 nor 0: {train!r}")
            found["train"] = bool(train)
        return found


def in_order(messages: Messages) -> Messages:
    """The same, where templates can take them. Raises BadRowError."""
    if not messages:
        raise BadRowError("an empty conversation")
    places = [i for i, message in enumerate(messages, start=1) if message["role"] == "system"]
    if len(places) > 1:
        raise BadRowError(f"two system turns: message {places[0]} and message {places[1]}; make them one")
    if places and places[0] > 1:
        raise BadRowError(f"a system turn that is not the first: message {places[0]}")
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first is None:
        raise BadRowError("nothing but a system turn")
    if first in ("assistant", "tool"):
        raise BadRowError(f"begins with a turn of the {first}; begin with the user's")
    return messages


def with_system(system: str, messages: Messages) -> Messages:
    return [{"role": "system", "content": system}, *messages] if system else messages


def read_tools(value: Any) -> Tools | None:
    """Functions, as `{"type": "function", "function": {...}}` each; from a list or JSON, wrapped or bare. Raises
    BadRowError.
    """
    value = from_json(value, "`tools`") if value else None
    if not value:
        return None
    found = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("`tools` holds something that is no function with a `name`")
        found.append({"type": "function", "function": function})
    return found


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Of one call or a list of them, wrapped or bare, arguments as an object or as JSON."""
    value = from_json(value, f"the call in {where}")
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"the call in {where} has no `name` of a function")
        arguments = from_json(function.get("arguments", function.get("parameters")) or {}, f"the arguments in {where}")
        if not isinstance(arguments, dict):
            raise BadRowError(f"the arguments of the call in {where} are {kind(arguments)} instead of an object")
        one: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({"id": call["id"], **one} if isinstance(call.get("id"), str) else one)
    return found


def _content(value: Any, where: str, role: str, message: Mapping[str, Any]) -> str:
    """A text; of parts, those that are text; of a tool, also a value as JSON."""
    if value is None:
        raise BadRowError(
            f"{where} has no content: it has {listed(key for key in message if message[key] is not None)}"
        )
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        others = sorted({str(part["type"]) for part in value if part["type"] != "text"})
        if others:
            raise BadRowError(f"{where} has parts that are no text: {listed(others)}")
        value = "".join(string(part.get("text"), f"a part of {where}") for part in value)
    if role == "tool" and isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return string(value, f"the content of {where}")
