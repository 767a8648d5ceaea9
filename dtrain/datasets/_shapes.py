"""What rows are, found by looking at the first of them: which shape, and which column is which part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dtrain.config.compose import nearest
from dtrain.datasets._values import kind, kinds, listed
from dtrain.errors import DataError

Shape = Literal[
    "auto", "text", "completion", "messages", "sharegpt", "alpaca", "qa", "classification", "preference", "kto"
]
PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "content", "document", "sentence", "正文", "文本", "内容"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction", "指令"),
    "input": ("input", "context", "输入"),
    "output": ("output", "response", "输出"),
    "history": ("history", "历史"),
    "system": ("system", "system_prompt", "system_message", "系统"),
    "question": ("question", "query", "ask", "q", "problem", "prompt", "instruction", "input", "user", "human",
                 "问题", "提问", "问句", "问", "用户", "输入"),
    "answer": ("answer", "response", "reply", "a", "solution", "completion", "output", "assistant", "target",
               "回答", "答案", "答复", "回复", "答", "助手", "输出"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "对话"),
    "tools": ("tools", "functions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label", "labels", "class", "kto_tag", "标签", "类别"),
}  # fmt: skip
"""Parts of a row, and the names that columns have for each; the first that is there is taken."""
MESSAGE_PARTS = ("role", "content")
"""Keys of a message, which may have other names too."""
LOOKED_AT = 200

Seen = Mapping[str, frozenset[type]]
"""Columns, and the types of their values, in the order of the first rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    name: str
    words: str
    """What its rows become."""
    needs: tuple[tuple[str, ...], ...]
    """One part of each."""
    may: tuple[str, ...] = ()
    types: Mapping[str, tuple[type, ...]] = dataclasses.field(default_factory=dict)
    """Of a part, the types of values, one of which some rows are to have."""

    def unfit(self, types: Mapping[str, frozenset[type]]) -> list[str]:
        """The parts whose values are of no such type."""
        return [part for part, one_of in self.types.items() if part in types and not types[part] & set(one_of)]


_SIDES = ("system", "tools")
_ASKED = ("prompt", "question", "messages")
FORMS = (
    Form("preference", "as pairs of replies", (("chosen",), ("rejected",)), (*_ASKED, "input", "history", *_SIDES)),
    Form("kto", "as replies with a verdict", (("completion", "messages", "answer"), ("label",)),
         ("prompt", "question", "input", "history", *_SIDES), {"label": (bool,)}),
    Form("messages", "as conversations", (("messages",),), _SIDES, {"messages": (list, str)}),
    Form("alpaca", "as conversations", (("instruction",), ("output",)), ("input", "history", *_SIDES),
         {"instruction": (str,), "output": (str,)}),
    Form("completion", "as prompts and completions", (("prompt",), ("completion",)), (),
         {"prompt": (str,), "completion": (str,)}),
    Form("completion", "as conversations", (("prompt",), ("completion",)), _SIDES, {"completion": (list, dict)}),
    Form("qa", "as conversations", (("question",), ("answer",)), ("input", "history", *_SIDES),
         {"question": (str,), "answer": (str,)}),
    Form("classification", "as labelled texts", (("text",), ("label",)), (),
         {"text": (str,), "label": (str, int, bool)}),
    Form("text", "as texts", (("text",),), (), {"text": (str,)}),
)  # fmt: skip
"""In the order in which they are tried."""
_SAME = {"sharegpt": "messages"}


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    form: Form
    columns: Mapping[str, str]
    """Parts, and the columns that hold them."""
    needed: tuple[str, ...]
    """The columns that each row must have."""
    unused: tuple[str, ...]
    instead: str = ""
    """Why they are no rows of a shape that would use more of the columns."""

    @property
    def text(self) -> str:
        """`question=ask, answer`: the parts and their columns."""
        return ", ".join(part if part == self.columns[part] else f"{part}={self.columns[part]}"
                         for part in PARTS if part in self.columns)  # fmt: skip


def look(first: Sequence[tuple[str, Mapping[str, Any]]], shape: Shape, columns: Mapping[str, str]) -> Layout:
    """`first`: source and values of some rows. Raises DataError where no shape fits, or what was said of the columns
    cannot be.
    """
    rows = [row for _, row in first]
    seen = _seen(rows)
    problems = _wrong_columns(seen, columns)
    if problems:
        raise DataError.of(problems)
    mapped = {part: name for part, name in columns.items() if part in PARTS}
    forms = [form for form in FORMS if shape in ("auto", form.name) or _SAME.get(shape) == form.name]
    found = [layout for form in forms if (layout := _match(form, seen, mapped)) and set(mapped) <= set(layout.columns)]
    fitting = [layout for layout in found if not _unfit(layout, seen)]
    if fitting:
        nums = [_rows_of(layout, rows) for layout in fitting]
        # The first that is of about as many rows as any: a row without its label is a bad row, and no reason to read
        # the others without theirs.
        taken = next(layout for layout, num in zip(fitting, nums, strict=True) if 2 * num >= max(nums))
        return dataclasses.replace(taken, instead=_instead(taken, found[: found.index(taken)], seen))
    if shape != "auto":
        if found:  # it was said, so each row is told what is wrong with it
            return found[0]
        raise DataError(_lacking(forms[0], shape, seen, mapped))
    if len(seen) == 1 and not mapped and set(seen.values()) == {frozenset({str})}:
        return Layout(FORMS[-1], {"text": next(iter(seen))}, tuple(seen), ())
    if found:
        raise DataError(_of_other_types(min(found, key=lambda layout: len(_unfit(layout, seen))), seen, first))
    empty = [name for name, types in seen.items() if not types]
    nothing = f"; null in all {len(first):,} rows looked at: {listed(empty)}" if empty else ""
    raise DataError(f"dataset: no known columns: the rows have {listed(seen)}{nothing}; say which column is what, as "
                    f"in dataset.columns.question=COLUMN dataset.columns.answer=COLUMN; parts of a row are "
                    f"{', '.join(PARTS)}")  # fmt: skip


def _seen(rows: Sequence[Mapping[str, Any]]) -> Seen:
    seen: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            types = seen.setdefault(name, set())
            if value is not None:
                types.add(type(value))
    return {name: frozenset(types) for name, types in seen.items()}


def _unfit(layout: Layout, seen: Seen) -> list[str]:
    return layout.form.unfit({part: seen[name] for part, name in layout.columns.items()})


def _instead(taken: Layout, before: Sequence[Layout], seen: Seen) -> str:
    for layout in before:
        part = next((part for part in _unfit(layout, seen) if layout.columns[part] in taken.unused), None)
        if part is not None:
            name, wanted = layout.columns[part], kinds(layout.form.types[part])
            return (f"no {layout.form.name} rows, since `{name}` is {kinds(seen[name])} instead of {wanted}; "
                    f"dataset.shape={layout.form.name} where it is meant so")  # fmt: skip
    return ""


def _of_other_types(layout: Layout, seen: Seen, first: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The columns are those of a shape, but not what is in them."""
    part = _unfit(layout, seen)[0]
    name, wanted = layout.columns[part], kinds(layout.form.types[part])
    source, value = next(
        ((source, row[name]) for source, row in first if row.get(name) is not None), (first[0][0], None)
    )
    return (f"dataset: {source}: `{name}` is {kind(value)} instead of {wanted}, and none of the {len(first):,} rows "
            f"looked at has {wanted} there; they look like {layout.form.name} rows ({layout.text}): convert that "
            f"column, or say which is what, as in dataset.columns.{part}=COLUMN; there are {listed(seen)}")  # fmt: skip


def _rows_of(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows have all that the form needs."""
    return sum(all(row.get(name) is not None for name in layout.needed) for row in rows)


def _match(form: Form, seen: Seen, mapped: Mapping[str, str]) -> Layout | None:
    """The form with its columns, or None where one is not there."""
    found: dict[str, str] = {}

    def take(part: str) -> bool:
        taken = {*found.values(), *(name for other, name in mapped.items() if other != part)}
        name = mapped.get(part) or _named(PARTS[part], seen, taken)
        if name is not None:
            found[part] = name
        return name is not None

    if not all(any(take(part) for part in group) for group in form.needs):
        return None
    for part in form.may:
        if part in _ASKED and set(_ASKED) & set(found):
            continue
        take(part)
    used = set(found.values())
    needed = tuple(name for part, name in found.items() if any(part in group for group in form.needs))
    return Layout(form, found, needed, tuple(name for name in seen if name not in used))


def _named(names: Sequence[str], seen: Seen, taken: set[str]) -> str | None:
    there: dict[str, str] = {}
    for column, types in seen.items():
        if types and column not in taken:
            there.setdefault(column.strip().lower(), column)
    return next((there[name] for name in names if name in there), None)


def _wrong_columns(seen: Seen, columns: Mapping[str, str]) -> list[str]:
    problems = []
    for part, name in columns.items():
        if part not in PARTS and part not in MESSAGE_PARTS:
            problems.append(f"dataset.columns.{part}: no part of a row{nearest(part, [*PARTS, *MESSAGE_PARTS])}; there "
                            f"are: {', '.join([*PARTS, *MESSAGE_PARTS])}")  # fmt: skip
        elif part in PARTS and name not in seen:
            problems.append(f"dataset.columns.{part}={name}: no such column{nearest(name, list(seen))}; there are: "
                            f"{listed(seen)}")  # fmt: skip
    return problems


def _lacking(form: Form, shape: str, seen: Seen, mapped: Mapping[str, str]) -> str:
    lacks = [group for group in form.needs
             if not any(part in mapped or _named(PARTS[part], seen, set()) for part in group)]  # fmt: skip
    if lacks:
        named = " and for ".join(" or ".join(f"`{part}`" for part in group) for group in lacks)
        return (f"dataset.shape={shape}: no column for {named}; there are: {listed(seen)}; name it, as in "
                f"dataset.columns.{lacks[0][0]}=COLUMN")  # fmt: skip
    parts = [*(part for group in form.needs for part in group), *form.may]
    return (f"dataset.columns: {listed(part for part in mapped if part not in parts)} is no part of "
            f"dataset.shape={shape}, whose parts are {', '.join(parts)}")  # fmt: skip
