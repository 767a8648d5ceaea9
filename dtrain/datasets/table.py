"""What datasets of rows in columns share: finding out what the rows are, and reading them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from dtrain.config.spec import Span, spec
from dtrain.datasets._messages import ROLES, Names
from dtrain.datasets._rows import Reading
from dtrain.datasets._shapes import LOOKED_AT, MESSAGE_PARTS, PARTS, Shape, look
from dtrain.datasets._values import from_json, listed
from dtrain.datasets.badrows import BadRowError, BadRows
from dtrain.datasets.base import (
    AbstractRows,
    Chat,
    Completion,
    Example,
    Judged,
    Labelled,
    Preference,
    Skipped,
    Text,
)
from dtrain.errors import DataError

_MAKES: Mapping[Shape, tuple[type[Example], ...]] = {
    "auto": (), "text": (Text,), "completion": (Completion, Chat), "messages": (Chat,), "sharegpt": (Chat,),
    "alpaca": (Chat,), "qa": (Chat,), "classification": (Labelled,), "preference": (Preference,), "kto": (Judged,),
}  # fmt: skip
"""What rows become by `shape`."""
Found = tuple[str, dict[str, Any] | BadRowError]
"""A row's source, as `file:line`, and its values by column, or why it has none."""


@spec
class AbstractTable(AbstractRows):
    shape: Shape = "auto"
    """What a row is: text, completion, messages, sharegpt, alpaca, qa, classification, preference, kto; `auto` finds it
    by looking at the first rows, and prints it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Parts of a row and the columns that hold them, as {question: ask, answer: reply}; what is not named is found by
    usual names. `role` and `content` are the keys of a message."""
    roles: dict[str, str | list[str]] = Field(default_factory=dict)
    """Roles as the chat template knows them and their names in the rows, as {function_call: search, tool: [return,
    found]}; the usual names are known."""
    labels: list[str] = Field(default_factory=list)
    """The labels of a classification that there may be; any where none is named."""

    @abstractmethod
    def rows(self) -> Iterator[Found]:
        """In file order, the same each time. Raises DataError."""

    @abstractmethod
    def about(self) -> list[str]:
        """Where the rows come from and how they are read, a line each. Raises DataError."""

    def rows_in(self, span: Span) -> Iterator[Found]:
        """Those of a span, as `rows` yields them. Raises DataError."""
        return self.rows()

    def problems(self) -> list[str]:
        parts = [*PARTS, *MESSAGE_PARTS]
        names = [name for name, _ in self._roles()]
        twice = sorted({name for name in names if names.count(name) > 1})
        return [
            *(
                f"dataset.columns.{part}: no part of a row; there are: {', '.join(parts)}"
                for part in self.columns
                if part not in parts
            ),
            *(f"dataset.roles: {listed(twice)} under two roles; leave each under one" for _ in twice[:1]),
        ]

    def shapes(self) -> Sequence[type[Example]]:
        return _MAKES[self.shape]

    def notes(self) -> list[str]:
        found = self._look()
        return self.about() + (_words(*found) if found else [])

    def examples(self) -> Iterator[Example]:
        found = self._look()
        bad = BadRows.of(self)
        shape: type[Example] | None = None
        for source, row in self.rows():
            try:
                if isinstance(row, BadRowError):
                    raise row
                assert found is not None, "a row that is none of the first"
                example = found[0].example(source, row)
                shape = shape or type(example)
                if type(example) is not shape:
                    raise BadRowError(f"a {type(example).__name__.lower()} among rows of {shape.__name__.lower()}: "
                                      f"keep one kind in a dataset")  # fmt: skip
            except BadRowError as error:
                yield bad.add(source, error)
                continue
            bad.num_good += 1
            if not bad.fatal:
                yield example
        bad.check()

    def read(self, span: Span) -> Iterator[Example]:
        for source, row in self.rows_in(span):
            try:
                if isinstance(row, BadRowError):
                    raise row
                assert self._reading is not None, "a row that is none of the first"
                example = self._reading.example(source, row)
            except BadRowError as error:
                if self.on_bad_row == "error":
                    raise DataError(f"{self.told(source)}: {error}; repair or remove this row, or set "
                                    f"dataset.on_bad_row=skip") from error  # fmt: skip
                yield Skipped(source, error.reason, bad=True)
                continue
            yield example

    @cached_property
    def _reading(self) -> Reading | None:
        """For spans, of which there are many: found out once."""
        found = self._look()
        return None if found is None else found[0]

    def _roles(self) -> list[tuple[str, str]]:
        """Each name in the rows, and the role that it is."""
        return [(name, role) for role, names in self.roles.items()
                for name in ([names] if isinstance(names, str) else names)]  # fmt: skip

    def _look(self) -> tuple[Reading, Sequence[Mapping[str, Any]]] | None:
        """How to read the rows, and the first of them; None where there is none. Raises DataError."""
        first: list[tuple[str, dict[str, Any]]] = []
        for number, (source, row) in enumerate(self.rows(), start=1):
            if isinstance(row, dict):
                first.append((source, row))
            if first and number >= LOOKED_AT:
                break
        if not first:
            return None
        names = Names(dict(self._roles()), self.columns.get("role"), self.columns.get("content"))
        return Reading(look(first, self.shape, self.columns), names, self.labels), [row for _, row in first]


def _words(reading: Reading, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rows are, what they become, and what of them is not used."""
    layout, names = reading.layout, reading.names
    messages = [message for row in rows for part in ("prompt", "completion", "messages", "chosen", "rejected")
                for message in _dicts(reading.get(row, part))]  # fmt: skip
    name = "sharegpt" if layout.form.name == "messages" and any("from" in message for message in messages) else None
    lines = [f"{name or layout.form.name} rows ({layout.text}) {layout.form.words}"]
    if layout.unused:
        lines[0] += f"; columns not used: {', '.join(layout.unused)}"
    if layout.instead:
        lines.append(layout.instead)
    roles = dict.fromkeys(str(names.role_of(message)) for message in messages)
    renamed = [f"{role} as {as_what}" for role in roles if (as_what := _known(names, role)) not in (role, None)]
    if renamed:
        lines.append(f"roles: {', '.join(renamed)}")
    unused = dict.fromkeys(key for message in messages for key in names.unused(message))
    if unused:
        lines.append(f"keys of messages that are not used: {listed(unused)}")
    return lines


def _dicts(value: Any) -> list[dict[str, Any]]:
    try:
        value = from_json(value, "") if isinstance(value, str) and value.lstrip().startswith("[") else value
    except BadRowError:
        return []
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


def _known(names: Names, role: str) -> str | None:
    return names.roles.get(role) or ROLES.get(role) or ROLES.get(role.lower())
