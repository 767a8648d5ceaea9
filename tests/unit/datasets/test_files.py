"""Finding, opening and reading files, and what is said of each row that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from dtrain.datasets.base import Skipped, Text
from dtrain.datasets.files import Files
from dtrain.errors import DataError


def write(path, *rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def read(path, **values):
    return list(Files(path=str(path), **values).examples())


def texts(path, **values):
    return [example.text for example in read(path, **values)]


def problems(path, **values):
    with pytest.raises(DataError) as caught:
        read(path, **values)
    return str(caught.value).replace(f"{path}", "F").split("\n  ")


def about(path, **values):
    return Files(path=str(path), **values).about()


def chat(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents, strict=False)]


# Lines


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n', b'{"text": "two\\u2028"}')
    assert read(path) == [Text(f"{path}:1", "one"), Text(f"{path}:4", "two\u2028")]


def _zst(data):
    import pyarrow as pa

    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", _zst)]


@pytest.mark.parametrize(("ending", "pack"), PACKED)
def test_packed_files(tmp_path, ending, pack):
    path = tmp_path / f"a.jsonl{ending}"
    data = pack(b'{"text": "one"}\n' * 1000)
    path.write_bytes(data)
    assert len(read(path)) == 1000
    path.write_bytes(data * 2)  # one after the other
    assert len(read(path)) == 2000
    path.write_bytes(data[:-20])  # a download that stopped
    assert "F: cannot be read: " in problems(path)[0]
    csv = tmp_path / f"b.csv{ending}"
    csv.write_bytes(pack(b"question,answer\na,b\n"))
    assert len(read(csv)) == 1
    assert about(csv) == [f"{csv}: csv in utf-8 with , between cells"]


# Encodings

LINES = '{"text": "头疼怎么办？多喝水，多休息。"}\n{"text": "a"}\n'
ENCODINGS = [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"),
             ("utf-16-be", "utf-16-be"), ("utf-32", "utf-32"), ("gb18030", "gb18030"), ("gbk", "gb18030")]  # fmt: skip


@pytest.mark.parametrize(("encoding", "found"), ENCODINGS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_encodings_are_found(tmp_path, kind, encoding, found):
    text = {
        "jsonl": LINES,
        "json": f"[{LINES.replace(chr(10), ',')}{LINES.splitlines()[1]}]",
        "csv": "title,text\n问题,头疼怎么办？多喝水，多休息。\n再问,a\n",
        "txt": "头疼怎么办？多喝水，多休息。\na\n",
    }[kind]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(text.encode(encoding))
    assert texts(path)[:2] == ["头疼怎么办？多喝水，多休息。", "a"]
    assert f" in {found}" in about(path)[0]


def test_letters_that_come_late(tmp_path):
    """The first mebibyte is plain English."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "plain"}\n' * 60_000 + '{"text": "手指割伤了"}\n'.encode("gb18030"))
    assert texts(path)[-1] == "手指割伤了"
    assert " in gb18030" in about(path)[0]


def test_a_bad_byte_among_good_lines_is_a_bad_line(tmp_path):
    good = '{"text": "Tür"}\n'.encode()
    path = write(tmp_path / "a.jsonl", good, b'{"text": "T\xb0\xa1r"}\n', good)
    assert problems(path)[1].startswith(
        "F:2: not UTF-8: byte 12 of the line; save the file as UTF-8, or name its dataset.encoding"
    )
    path.write_bytes('{"text": "Tür"}\n'.encode("latin-1") * 9)
    assert len(problems(path)) == 7  # the title, five of them, and how many more
    assert texts(path, encoding="latin-1") == ["Tür"] * 9


def test_an_encoding_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,x\n頭が痛い,1\n".encode("shift_jis"))
    assert texts(path, encoding="shift_jis", columns={"text": "text"}) == ["頭が痛い"]
    assert Files(path=str(path), encoding="klingon").problems() == [
        "dataset.encoding=klingon: no such encoding; such as utf-8, utf-16, gb18030, big5, latin-1"
    ]
    assert Files(path=str(path), encoding="hex").problems()


def test_utf_16_that_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode("utf-16")[:-1])
    assert "F: not UTF-16 soon after line 2" in problems(path)[0]


# Bad rows: each, and what is said of it

ROWS = [
    (b"{text: 1}\n", "F:4: not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"text": "cut o', "F:4: not JSON: Unterminated string starting at at column 10"),
    (b'{"text": "a\x00b"}\n', "F:4: not JSON: Invalid control character at at column 12"),
    (b'{"text": "a\\u0000b"}\n', "F:4: `text` has a NUL: at character 2"),
    (b'{"text": "a", "text": "b"}\n', "F:4: a key is there twice: `text`"),
    (b'{"text": "b", "x": {"y": 1, "y": 2}}\n', "F:4: a key is there twice: `y`"),
    (b"[" * 100_000 + b"\n", "F:4: not JSON: maximum recursion depth exceeded"),
    (b'{"text": "' + b"a" * 200_000 + b'"}\n', "F:4: longer than dataset.max_row_bytes=100100: raise it, or cut the row"),
    (b'{"text": "caf\xe9"}\n', "F:4: not UTF-8: byte 14 of the line; save the file as UTF-8, or name its dataset.encoding"),
    ({"text": "a\ud800"}, "F:4: `text` has half a surrogate pair: at character 2"),
    ([1], "F:4: a list instead of an object: each row is to be one `{...}`"),
    (b"null\n", "F:4: null instead of an object: each row is to be one `{...}`"),
    ({"txt": "a"}, "F:4: no `text`: the rows are read as text (text), and this one has `txt`"),
    ({"messages": chat("a", "b")}, "F:4: no `text`: the rows are read as text (text), and this one has `messages`"),
    ({}, "F:4: no `text`: the rows are read as text (text), and this one has nothing"),
    ({"text": 3}, "F:4: `text` is a number instead of a string"),
    ({"text": None}, "F:4: `text` is null instead of a string"),
    ({"text": True}, "F:4: `text` is a boolean instead of a string"),
    ({"text": " \n"}, "F:4: `text` is empty"),
]  # fmt: skip
S, U, A = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))
MESSAGES = [
    ({}, "`messages` is a list"),
    ([], "F:2: `messages` is empty"),
    ("hi", "F:2: `messages` is a string instead of a list"),
    (None, "F:2: `messages` is null instead of a list"),
    ({"role": "user"}, "F:2: message 1 has no content: it has `role`"),
    (["hi"], "F:2: message 1 is a string instead of an object"),
    ([{"content": "a"}], "F:2: message 1 has no role: it has `content`; name the key by dataset.columns.role"),
    ([{"role": "user"}], "F:2: message 1 has no content: it has `role`"),
    ([U, {"role": "assistant", "content": None}], "F:2: message 2 has no content: it has `role`"),
    ([{"role": "user", "content": ["a"]}], "F:2: the content of message 1 is a list instead of a string"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "F:2: message 1 has parts that are no text: `image_url`"),
    ([{"role": "", "content": "a"}], "F:2: the role of message 1 is empty"),
    ([{"role": 3, "content": "a"}], "F:2: the role of message 1 is a number instead of a string"),
    ([U, {"role": "wizard", "content": "a"}], "F:2: a role that is not known: `wizard`; say what it is, as in dataset.roles.tool=wizard ("),
    ([S, S, U, A], "F:2: two system turns: message 1 and message 2; make them one"),
    ([U, S, A], "F:2: a system turn that is not the first: message 2"),
    ([S], "F:2: nothing but a system turn"),
    ([A, U, A], "F:2: begins with a turn of the assistant; begin with the user's"),
    ([S, A], "F:2: begins with a turn of the assistant; begin with the user's"),
    ([{"role": "tool", "content": "a"}, A], "F:2: begins with a turn of the tool; begin with the user's"),
    ([U, {**A, "content": "a\0"}], "F:2: the content of message 2 has a NUL: at character 2"),
    ([U, {**A, "weight": 0.5}], "F:2: `train` or `weight` of message 2 is neither true nor false, 1 nor 0: 0.5"),
    ([U, {"role": "function_call", "content": "weather(Oslo)"}], "F:2: the call in message 2 is not JSON: Expecting value"),
    ([U, {"role": "function_call", "content": "{}"}], "F:2: the call in message 2 has no `name` of a function"),
    ([U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], "F:2: the arguments of the call in message 2 are a list instead of an object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_a_bad_row_is_named(tmp_path, row, expected):
    title, reason = problems(write(tmp_path / "a.jsonl", *[{"text": "good"}] * 3, row), max_row_bytes=100_100)
    assert title == "dataset: 1 bad row; repair or remove, or set dataset.on_bad_row=skip:"
    assert reason == expected or reason.startswith(f"{expected} ")


@pytest.mark.parametrize(("messages", "expected"), MESSAGES[1:])
def test_a_bad_conversation_is_named(tmp_path, messages, expected):
    _, reason = problems(write(tmp_path / "a.jsonl", {"messages": [U, A]}, {"messages": messages}))
    assert reason.startswith(expected)


FURTHER = [
    ({"question": "a", "answer": "b"}, {"question": "a", "answer": ""}, "F:4: `answer` is empty"),
    ({"question": "a", "answer": "b"}, {"question": "", "answer": "a"}, "F:4: `question` is empty"),
    ({"question": "a", "answer": "b"}, {"question": "a"}, "F:4: no `answer`: the rows are read as qa (question, answer), and this one has `question`"),
    ({"instruction": "a", "output": "b", "history": []}, {"instruction": "a", "output": "b", "history": [["x"]]}, "F:4: `history` holds something else than pairs of a question and its answer"),
    ({"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}, "F:4: `prompt` is null instead of a string"),
    ({"prompt": "a", "completion": "b"}, {"prompt": [U], "completion": [A]}, "F:4: a chat among rows of completion: keep one kind in a dataset"),
    ({"messages": [U, A], "tools": "[]"}, {"messages": [U, A], "tools": "[{]"}, "F:4: `tools` is not JSON: "),
    ({"messages": [U, A], "tools": []}, {"messages": [U, A], "tools": [{"x": 1}]}, "F:4: `tools` holds something that is no function with a `name`"),
    ({"messages": [U, A], "system": "a"}, {"messages": [S, U, A], "system": "a"}, "F:4: two system turns: message 1 and message 2; make them one"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}, "F:4: `chosen` and `rejected` are the same"),
    ({"chosen": [U, A], "rejected": [U, {**A, "content": "y"}]}, {"chosen": [U, A], "rejected": [U]}, "F:4: one of `chosen` and `rejected` is the beginning of the other"),
    ({"chosen": [U, A], "rejected": [U, {**A, "content": "y"}]}, {"chosen": "a", "rejected": "b"}, "F:4: nothing that is replied to: name a column as prompt, question or messages in dataset.columns"),
    ({"messages": [U, A], "label": True}, {"messages": [U, A], "label": "maybe"}, "F:4: `label` is neither true nor false: 'maybe'"),
    ({"messages": [U, A], "label": True}, {"messages": [U], "label": True}, "F:4: the last turn is not the assistant's, so the verdict is on nothing"),
    ({"text": "a", "label": "b"}, {"text": "a", "label": None}, "F:4: `label` is null instead of a label"),
    ({"text": "a", "label": "b"}, {"text": "a", "label": ""}, "F:4: `label` is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "expected"), FURTHER)
def test_a_bad_row_of_any_shape_is_named(tmp_path, good, bad, expected):
    _, reason = problems(write(tmp_path / "a.jsonl", good, good, good, bad))
    assert reason.startswith(expected)


def test_the_first_five_are_told_and_all_are_counted(tmp_path):
    rows = [{"text": "fine"}, *[{"text": i} for i in range(7)], {"text": "fine"}, {"messages": [U, A]}]
    told = problems(write(tmp_path / "a.jsonl", *rows))
    assert told[0] == "dataset: 8 bad rows; repair or remove, or set dataset.on_bad_row=skip:"
    assert [line.split(" ")[0] for line in told[1:6]] == [f"F:{number}:" for number in range(2, 7)]
    assert told[6:] == ["... and 3 more", "in all: 7 `text` is a number instead of a string, 1 no `text`"]


def test_no_good_row_at_all(tmp_path):
    told = problems(write(tmp_path / "a.jsonl", b"{\n" * 300))
    assert told[0].startswith("dataset: 300 bad rows")
    assert list(Files(path=str(write(tmp_path / "b.jsonl", b"\n"))).examples()) == []


def test_bad_rows_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": "fine"}] * 7, {"text": 3}, b"{\n", {"text": None})
    found = read(path, on_bad_row="skip", max_bad_fraction=0.3)
    assert [type(example) for example in found] == [Text] * 7 + [Skipped] * 3
    assert found[7:] == [
        Skipped(f"{path}:8", "`text` is a number instead of a string", bad=True),
        Skipped(f"{path}:9", "not JSON", bad=True),
        Skipped(f"{path}:10", "`text` is null instead of a string", bad=True),
    ]
    told = problems(path, on_bad_row="skip", max_bad_fraction=0.29)
    assert told[0] == "dataset.max_bad_fraction=0.29: 3 of 10 rows are bad, which is 30.0%; repair them, or raise it:"
    assert told[1] == "F:8: `text` is a number instead of a string"


def test_a_huge_line_is_never_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(64):
            file.write(b"a" * 2**20)
        file.write(b'"}\n{"text": "two"}\n')
    tracemalloc.start()
    try:
        found = read(path, on_bad_row="skip", max_bad_fraction=0.5, max_row_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert [example.reason if isinstance(example, Skipped) else example.text for example in found] == [
        "one", "longer than dataset.max_row_bytes=N", "two"]  # fmt: skip


# JSON


def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Wherever a piece ends: within a word, a number, a letter of several bytes, the white space."""
    rows = [{"text": f'größe {i} \\ " 头', "n": [i, -1.5e3, True, None]} for i in range(20)]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        for size in (1, 2, 3, 7, 64, 1000):
            monkeypatch.setattr("dtrain.datasets._json._CHUNK", size)
            assert texts(path) == [row["text"] for row in rows]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    assert [example.source for example in read(path)] == [f"{path}:{i + 2}" for i in range(20)]


def test_a_long_list_needs_little_memory(tmp_path):
    import tracemalloc

    path, row = tmp_path / "a.json", json.dumps({"text": "a" * 1000})
    path.write_text("[" + ",".join([row] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in Files(path=str(path)).examples()) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


OBJECTS = {
    "columns": {"text": ["a", "b"], "n": [1, 2]},
    "columns by row": {"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}},
    "wrapped": {"version": 1, "data": [{"text": "a"}, {"text": "b"}]},
}


@pytest.mark.parametrize("how", OBJECTS)
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_of_rows(tmp_path, how, indent):
    (tmp_path / "a.json").write_text(json.dumps(OBJECTS[how], indent=indent) + "\n")
    found = read(tmp_path / "a.json")
    assert [(example.source.rpartition(":")[2], example.text) for example in found] == [("row 1", "a"), ("row 2", "b")]


def test_objects_one_after_the_other(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # JSON lines under another name
    assert read(path) == [Text(f"{path}:1", "a"), Text(f"{path}:2", "b")]
    path.write_text(json.dumps({"text": "a"}, indent=1) + "\n" + json.dumps({"text": "b"}, indent=1))
    assert read(path) == [Text(f"{path}:1", "a"), Text(f"{path}:4", "b")]
    path.write_text(json.dumps({"messages": [U, A], "id": 3}, indent=1))
    assert len(read(path)) == 1
    path.write_text(" \n")
    assert read(path) == []


JSON = [
    (b"[1, 2]", "F:1: a number instead of an object: each row is to be one `{...}`"),
    (b'[{"text": "a"},\n{"text": "b", "text": "c"}]', "F:2: a key is there twice: `text`"),
    (b'[{"text": "a"},\n{"text": "b"]', "F:2: not JSON: Expecting ',' delimiter (column 13); repair the file: no row after this can be read"),
    (b'[{"text": "a"},\n{"text": "b', "F:2: not JSON: Unterminated string starting at (column 10); repair"),
    (b'[{"text": "a"},\n', "F:2: not JSON: Expecting value (column 1); repair"),
    (b'[{"text": "a"}\n', "F:2: not JSON: ends within the list (column 1); repair"),
    (b'[{"text": "a"}\n{"text": "b"}]', "F:2: not JSON: '{' instead of a comma or ] (column 1); repair"),
    (b'[{"text": "a"}]\n]', "F:2: not JSON: ']' after the end of the list (column 1); repair"),
    (b'[{"text": "a"},\n{"text": "a\xff"}]', "F:2: not UTF-8; save the file as UTF-8, or name its dataset.encoding"),
    (b"[" * 100_000, "F:1: not JSON: maximum recursion depth exceeded"),
    (b'{"text": ["a"], "n": [1, 2]}', "F: columns of different length: `text` 1, `n` 2"),
    (b'{\n"text": "a",\n"text": "b"}', "F: a key is there twice: `text`"),
    (b'{\n"text": "a",,\n}', "F:2: not JSON: Expecting property name enclosed in double quotes"),
    (b"3", "F: neither a list of objects nor an object; it begins with '3'"),
    (b'[{"text": "' + b"a" * 3000 + b'"}]', "F:1: not JSON: a row longer than dataset.max_row_bytes=2000; raise it, or cut the row"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), JSON)
def test_a_bad_json_file_is_named(tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr("dtrain.datasets._json._CHUNK", 500)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert expected in problems(path, max_row_bytes=2000)[-1]


# CSV


def test_delimiters_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    for between in ",;\t|":
        path.write_text(f'question{between}answer\n"a{between}b"{between}"c ""d""\n e"\n\nf{between}g\n', newline="")
        found = [[message["content"] for message in example.messages] for example in read(path)]
        assert found == [[f"a{between}b", 'c "d"\n e'], ["f", "g"]]
        assert [example.source for example in read(path)] == [f"{path}:2", f"{path}:5"]
    path.write_text("question~answer\na~b\n")
    assert len(read(path, delimiter="~")) == 1
    path.write_text('question\tanswer\n"Well," he said\tb\n')
    assert "F:2: not TSV: '\t' expected after '\"'" in problems(path)[1]
    assert len(read(path, delimiter="tab", quote="")) == 1
    assert Files(path=str(path), delimiter="tabs").problems() == [
        "dataset.delimiter=tabs: neither one character nor `tab`"
    ]


CSV = [
    (b"question,answer\na,b\nc\n", "F:3: another number of cells than the first line names: 1 instead of 2"),
    (b"question,answer\na,b\nc,d,e\n", "F:3: another number of cells than the first line names: 3 instead of 2"),
    (b'question,answer\na,b\n"c"x,d\n', "F:3: not CSV: ',' expected after '\"'"),
    (b'question,answer\na,b\n"c,d\n', "F:3: not CSV: unexpected end of data"),
    (b"question,answer\na,b\nc\x00,d\n", "F:3: `question` has a NUL: at character 2"),
    (b"question,answer\na,b\nc\xff,d\n", "F:3: not UTF-8: byte 2 of the line"),
    (b"question,answer\na,b\nc,\n", "F:3: `answer` is empty"),
    (b"question,answer\na,b\n" + b"c" * 3000 + b",d\n", "F:3: longer than dataset.max_row_bytes=2000"),
    (b"text,answer,text\na,b,c\n", "F:1: two columns of the name `text`; the first line is to name the columns"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), CSV)
def test_a_bad_csv_file_is_named(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert expected in problems(path, max_row_bytes=2000)[-1]


# Parquet and Arrow


def test_parquet_and_arrow(tmp_path):
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    rows = [
        {"messages": [U, {**A, "tool_calls": calls}, {"role": "tool", "content": "y"}, A], "id": i} for i in range(600)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    pyarrow.feather.write_feather(table, tmp_path / "b.feather")
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    for name in ("a.parquet", "b.feather", "c.arrow"):
        found = read(tmp_path / name)
        assert len(found) == 600
        assert found[-1].source == f"{tmp_path / name}:row 600"
        assert found[-1].messages == rows[0]["messages"]  # without the nulls that each message has for each key
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        assert "that can be read" in problems(tmp_path / name)[0]
        packed = write(tmp_path / f"{name}.gz", gzip.compress(b"PAR1"))
        assert "no ending there tells a format" in Files(path=str(packed)).problems()[0]
        assert "that can be read" in problems(packed, format="parquet" if "parquet" in name else "arrow")[0]
    pq.write_table(pa.table({"text": ["a", None, ""]}), tmp_path / "d.parquet")
    assert problems(tmp_path / "d.parquet")[1:] == [
        "F:row 2: `text` is null instead of a string",
        "F:row 3: `text` is empty",
    ]


# Plain text


def test_what_a_document_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\n \r\nthree\r\n")
    assert read(path) == [Text(f"{path}:1", "one\r\ntwo"), Text(f"{path}:5", "three")]
    assert texts(path, text_unit="line") == ["one", "two", "three"]
    assert texts(path, text_unit="file") == ["one\r\ntwo\r\n\r\n \r\nthree\r\n"]
    assert about(path, text_unit="file")[1] == "plain text, a document for each file"
    path.write_text("one\ntwo\n")
    assert texts(path) == ["one", "two"]
    (tmp_path / "b.txt").write_text("three\n\nfour")
    (tmp_path / "empty.txt").write_text("\n")
    assert texts(tmp_path) == ["one\ntwo\n", "three\n\nfour"]
    assert about(tmp_path)[1].startswith("plain text, a document for each file, since there are several; ")


def test_bad_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\n\xff\nthree\n\nfour\n" + b"a\n" * 30 + b"\nfive\0\n")
    told = problems(path, max_row_bytes=40)
    assert [line.split(":")[:2] for line in told[1:]] == [["F", "3"], ["F", "7"], ["F", "39"]]
    assert "longer than dataset.max_row_bytes=40: divide it by blank lines" in told[2]
    assert [line.split(":")[1] for line in problems(path, text_unit="line")[1:]] == ["4", "39"]
    assert "F:1: longer than dataset.max_row_bytes=40: raise it, or set dataset.text_unit=paragraph" in problems(
        path, text_unit="file", max_row_bytes=40)  # fmt: skip
    assert "F:1: not UTF-8: byte 10 of the file" in problems(path, text_unit="file")[1]


# Paths


def test_patterns_and_lists(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    write(tmp_path / "odd[1].jsonl", {"text": "odd"})
    (tmp_path / "notes.md").write_text("read me")
    (tmp_path / "a.dat").write_text("1")
    monkeypatch.chdir(tmp_path)
    assert texts("[abc].jsonl") == ["a", "b", "c"]
    assert [example.text for example in Files(path=["c.jsonl", "?.jsonl"]).examples()] == ["c", "a", "b"]  # each once
    assert texts(str(tmp_path / "**" / "a.jsonl")) == ["a"]
    assert texts("odd[1].jsonl") == ["odd"]
    assert texts("notes.md") == ["read me"]
    assert texts("a.*") == ["a"]
    assert about("a.*") == ["a.jsonl: jsonl in utf-8", "files passed over: 1 .dat"]


def test_folders(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    write(tmp_path / "b.jsonl", {"text": "b"})
    write(tmp_path / "deep" / "er" / "c.jsonl.gz", gzip.compress(b'{"text": "c"}\n'))
    (tmp_path / "a.csv").write_text("text,n\na,1\n")
    write(tmp_path / ".git" / "d.jsonl", {"text": "d"})
    for name in ("README.md", "LICENSE", "x.bin", "y.BIN"):
        (tmp_path / name).write_text("x")
    assert texts(tmp_path, columns={"text": "text"}) == ["a", "b", "c"]
    assert about(tmp_path) == [
        "3 files: 1 csv in utf-8 with , between cells, 2 jsonl in utf-8",
        "files passed over: 2 .bin, 1 .md, 1 LICENSE",
    ]


def test_mixed_schemas_are_told_by_file(tmp_path):
    write(tmp_path / "a.jsonl", *[{"question": "a", "answer": "b"}] * 5)
    write(
        tmp_path / "b.jsonl", *[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2
    )
    told = problems(tmp_path)
    assert told[1] == ("F/b.jsonl:1: no `question`, `answer`: the rows are read as qa (question, answer), and this one has "
                       "`conversations`")  # fmt: skip


def test_a_path_that_is_not_there(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})

    def problem(path):
        (found,) = Files(path=str(path)).problems()
        with pytest.raises(DataError):
            next(Files(path=str(path)).examples())
        return found

    assert problem(tmp_path / "trian.jsonl").endswith(f"no such file in {tmp_path}; did you mean train.jsonl?")
    assert problem(tmp_path / "zzz.jsonl").endswith("did you mean train.jsonl?")
    assert "there is no folder" in problem(tmp_path / "none" / "a.jsonl")
    assert problem(tmp_path / "*.json").endswith("no file matches; correct the pattern")
    (tmp_path / "none").mkdir()
    assert problem(tmp_path / "none").endswith(
        ": a folder in which there is no file; name another, or put the files there"
    )
    (tmp_path / "rows").write_text('{"text": "a"}\n')
    assert problem(tmp_path / "rows").endswith("(there is rows; known are .jsonl, .ndjson, .jsonlines, .json, .csv, .tsv, .parquet, "
                                               ".pq, .arrow, .feather, .txt, .text, and these with .gz, .bz2, .xz, .zst); name it, "
                                               "as in dataset.format=jsonl or dataset.format=text")  # fmt: skip
    assert texts(tmp_path / "rows", format="jsonl") == ["a"]
    assert Files(path="???").problems() == ["dataset.path: not given; name a file, as in dataset.path=data/train.jsonl"]
    assert Files(path=[]).problems() == ["dataset.path: an empty list; name a file"]
    assert Files(path=str(tmp_path / "train.jsonl")).problems() == []


def test_a_folder_that_datasets_saved(tmp_path):
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    (said,) = Files(path=str(tmp_path)).problems()
    assert said.endswith(f"was saved by the datasets library; type dataset=hub dataset.name={tmp_path}")


# The digest


def test_the_digest_is_of_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one"})
    first = Files(path=str(path)).digest()
    os.utime(path, (1, 1))
    assert Files(path=str(path)).digest() == first
    stat = path.stat()
    write(path, {"text": "two"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as long as before, and as old
    assert Files(path=str(path)).digest() != first
    (tmp_path / "b.csv").write_bytes(path.read_bytes())
    assert Files(path=str(tmp_path / "b.csv")).digest() != Files(path=str(path)).digest()  # read in another way


@pytest.mark.parametrize("limit", ["_WHOLE", "_WHOLE_IN_ALL"])
def test_the_digest_of_a_large_file(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"dtrain.datasets._find.{limit}", 10)
    monkeypatch.setattr("dtrain.datasets._find._AT_EACH_END", 5)
    path = tmp_path / "a.jsonl"
    digests = set()
    for content, time in ((b"a" * 20, 1), (b"b" + b"a" * 19, 1), (b"a" * 19 + b"b", 1), (b"a" * 20, 2), (b"a" * 21, 1)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        digests.add(Files(path=str(path)).digest())
    assert len(digests) == 5


@pytest.mark.parametrize("values", [{"max_length": 1}, {"on_long": "ignore"}, {"packng": True}, {"path": 3.5j}, {"shape": "poem"},
                                    {"max_row_bytes": 0}, {"quote": "''"}, {"max_bad_fraction": 1.1}, {"format": "xls"}])  # fmt: skip
def test_wrong_values_are_refused(values):
    with pytest.raises(ValidationError):
        Files(**{"path": "a.jsonl", **values})


def test_rows_are_the_same_each_time():
    files = Files(path=str(Path(__file__).parent / "files" / "sharegpt.json"))
    assert list(files.examples()) == list(files.examples())
