"""Whatever stands in a file: examples, or an error in our words; nothing else, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.datasets.base import Skipped
from dtrain.datasets.files import Files
from dtrain.errors import DataError

PIECES = [b'{"text": "a"}', b'{"question": "a", "answer": "b"}', b"question,answer", b"text", b"a,b", b'"', b"{", b"}", b"[", b"]",
          b",", b"\n", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xb0\xa1", "é头".encode(), b" ", b"\\ud800", b"1e999", b"NaN",
          b"\t", b"null", b'{"messages": [{"role": "user", "content": "a"}]}', b"PAR1", b"ARROW1\0\0"]  # fmt: skip
KEYS = st.sampled_from(["text", "label", "prompt", "completion", "question", "answer", "messages", "chosen", "rejected", "tools",
                        "system", "history", "instruction", "input", "output", "x"])  # fmt: skip
MESSAGE_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "weight", "name", "function", "arguments"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(
    ["user", "assistant", "human", "gpt", "function_call", "system", "tool", "[]", "[{", '{"name": "f", "arguments": {}}', "\0", ""])  # fmt: skip
MESSAGES = st.lists(st.dictionaries(MESSAGE_KEYS, st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    MESSAGE_KEYS, inner, max_size=3), max_leaves=4), max_size=4) | SCALARS, max_size=4)  # fmt: skip
ROWS = st.lists(st.dictionaries(KEYS, SCALARS | MESSAGES, max_size=5) | SCALARS, min_size=1, max_size=4)


def _read(path: Path) -> int:
    """How many rows were found, good or bad; -1 where the file as a whole was refused."""
    files = Files(path=str(path), on_bad_row="skip", max_bad_fraction=1.0, max_row_bytes=4000)
    try:
        notes, examples = files.notes(), list(files.examples())
    except DataError as error:
        assert str(error)
        with pytest.raises(DataError):
            list(Files(path=str(path), max_row_bytes=4000).examples())
        return -1
    assert all(isinstance(note, str) for note in notes)
    for example in examples:
        assert example.source.startswith(f"{path}:")
        assert isinstance(example, Skipped) or all(isinstance(text, str) for text in example.texts())
    return len(examples)


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "jsonl.gz", "json.zst"]),
    pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25),
)
def test_any_bytes(tmp_path_factory, kind, pieces):
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    path.write_bytes(b"".join(pieces))
    _read(path)


@settings(deadline=None, max_examples=100)
@given(rows=ROWS)
def test_any_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    lines, whole = folder / "a.jsonl", folder / "b.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.write_text(json.dumps(rows))
    assert _read(lines) == _read(whole)
    assert _read(lines) in (-1, len(rows))
