"""Prompts in a file of JSON lines: a text, or a conversation, on each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.errors import DataError

ADDED = ("generated", "finish", "num_tokens")
"""What the rows of the answer have besides."""
_MOST_TOLD = 8


class Asked(NamedTuple):
    place: str
    """`file:line`."""
    row: Mapping[str, Any]
    """As it stands there."""
    prompt: str | Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


def read(path: Path, *, chat: bool, option: str) -> list[Asked]:
    """All rows; `chat`: a `prompt` is what a user says; `option`: by which the file was named. Raises DataError with
    all that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option}{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # a text may have what else Python ends lines at
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            found.append(asked(place, json.loads(line), chat=chat))
        except ValueError as error:
            problems.append(f"{place}: {error if isinstance(error, RowError) else f'not JSON: {error}'}")
    if problems:
        more = [f"  and {len(problems) - _MOST_TOLD:,} more"] if len(problems) > _MOST_TOLD else []
        raise DataError.of([*problems[:_MOST_TOLD], *more])
    if not found:
        raise DataError(f"{option}{path}: no rows; each line is to be an object with `prompt` or `messages`")
    return found


class RowError(ValueError):
    """What is wrong with a row."""


def asked(place: str, row: Any, *, chat: bool) -> Asked:
    """Of one row. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("not an object with `prompt` or `messages`")
    if taken := [key for key in ADDED if key in row]:
        raise RowError(f"has `{taken[0]}` already, which the answer would have; rename it")
    if ("prompt" in row) == ("messages" in row):
        raise RowError(f"needs `prompt` or `messages`, one of the two; it has {', '.join(row) or 'nothing'}")
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise RowError("`prompt` is no text, or an empty one")
        return Asked(place, row, [{"role": "user", "content": prompt}] if chat else prompt)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(one) for one in messages):
        raise RowError("`messages` is not a list of objects with `role`, and `content` or `tool_calls`")
    if messages[-1]["role"] == "assistant":
        raise RowError("`messages` ends with a turn of the assistant, which is what is asked for; leave it out")
    return Asked(place, row, messages, row.get("tools"))


def _is_message(one: Any) -> bool:
    return (isinstance(one, dict) and isinstance(one.get("role"), str)
            and (isinstance(one.get("content"), str) or bool(one.get("tool_calls"))))  # fmt: skip
