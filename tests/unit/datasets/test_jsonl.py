import gzip
import json
import os

import pytest
from pydantic import ValidationError

from dtrain.datasets.base import Chat, Text
from dtrain.datasets.jsonl import Jsonl
from dtrain.errors import DataError


def write(path, *rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def read(path):
    return list(Jsonl(path=str(path)).examples())


def problems(path):
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value).replace(f"{path}", "F").split("\n  ")


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}


def test_texts_and_chats(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one", "url": "x"}, {"text": "two\n"})
    assert read(path) == [Text(f"{path}:1", "one"), Text(f"{path}:2", "two\n")]
    path = write(tmp_path / "b.jsonl", CHAT)
    assert read(path) == [Chat(f"{path}:1", CHAT["messages"])]


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n', b'{"text": "two\\u2028"}')
    assert read(path) == [Text(f"{path}:1", "one"), Text(f"{path}:4", "two\u2028")]


def test_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b'{"text": "one"}\n' * 1000)
    path.write_bytes(data)
    assert len(read(path)) == 1000
    path.write_bytes(data[:-20])  # a download that stopped
    assert "cannot be read" in problems(path)[0]


# Each bad row, and what is said of it.
BAD = [
    (b"{text: 1}\n", "F:1: not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"text": "cut o', "F:1: not JSON: Unterminated string starting at at column 10"),
    (b'{"text": "a\x00b"}\n', "F:1: not JSON: Invalid control character at at column 12"),
    (b'{"text": "a", "text": "b"}\n', "F:1: not JSON: the key `text` twice"),
    (b"[" * 100_000 + b"\n", "F:1: not JSON: maximum recursion depth exceeded"),
    (b'{"text": "caf\xe9"}\n', "F:1: not UTF-8 at byte 14 of the line; save the file as UTF-8"),
    ({"text": "a\ud800"}, "F:1: `text` has half a surrogate pair at character 2"),
    ([1], "F:1: a list instead of an object; each line is to be one `{...}`"),
    (None, "F:1: null instead of an object; each line is to be one `{...}`"),
    ({"prompt": "a", "answer": "b"}, "F:1: has neither `text` nor `messages`, but `prompt`, `answer`"),
    ({}, "F:1: has neither `text` nor `messages`, but nothing"),
    ({"text": "a", "messages": []}, "F:1: has both `text` and `messages`"),
    ({"text": 3}, "F:1: `text` is a number instead of a string"),
    ({"text": None}, "F:1: `text` is null instead of a string"),
    ({"text": " \n"}, "F:1: `text` is empty"),
    ({"messages": {}}, "F:1: `messages` is an object instead of a list"),
    ({"messages": []}, "F:1: `messages` is empty"),
    ({"messages": ["hi"]}, "F:1: message 1 is a string instead of an object"),
    ({"messages": [{"content": "a"}]}, "F:1: message 1 has no `role`, but `content`"),
    ({"messages": [{"role": "user"}]}, "F:1: message 1 has no `content`, but `role`"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "F:1: `content` of message 1 is a list instead of a string"),
    ({"messages": [{"role": "", "content": "a"}]}, "F:1: message 1 has an empty `role`"),
    ({**CHAT, "tools": []}, "F:1: has `tools`, which this version would not show to the model; remove them"),
]


@pytest.mark.parametrize(("row", "expected"), BAD)
def test_a_bad_row_is_named(tmp_path, row, expected):
    title, reason = problems(write(tmp_path / "a.jsonl", row))
    assert title == "dataset: 1 bad row; repair or remove, or set dataset.on_bad_row=skip:"
    assert reason == expected or reason.startswith(f"{expected} ")


def test_the_first_five_are_told_and_all_are_counted(tmp_path):
    rows = [{"text": "fine"}, *[{"text": i} for i in range(7)], {"text": "fine"}, CHAT]
    told = problems(write(tmp_path / "a.jsonl", *rows))
    assert told[0] == "dataset: 8 bad rows; repair or remove, or set dataset.on_bad_row=skip:"
    assert [line.split(" ")[0] for line in told[1:6]] == [f"F:{number}:" for number in range(2, 7)]
    assert told[6] == "... and 3 more"


def test_two_kinds_of_rows(tmp_path):
    told = problems(write(tmp_path / "a.jsonl", {"text": "a"}, CHAT))
    assert told[1] == "F:2: has `messages`, and the rows before have `text`; keep one kind in a dataset"


def test_patterns_and_lists(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    write(tmp_path / "odd[1].jsonl", {"text": "odd"})
    monkeypatch.chdir(tmp_path)

    def texts(path):
        return [example.text for example in Jsonl(path=path).examples()]

    assert texts("[abc].jsonl") == ["a", "b", "c"]
    assert texts(["c.jsonl", "?.jsonl"]) == ["c", "a", "b"]  # each file once
    assert texts(str(tmp_path / "**" / "a.jsonl")) == ["a"]
    assert texts("odd[1].jsonl") == ["odd"]


def test_a_path_that_is_not_there(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})

    def problem(path):
        (found,) = Jsonl(path=str(path)).problems()
        with pytest.raises(DataError):
            next(Jsonl(path=str(path)).examples())
        return found

    assert problem(tmp_path / "trian.jsonl").endswith(f"no such file in {tmp_path}; did you mean train.jsonl?")
    assert problem(tmp_path / "zzz.jsonl").endswith("did you mean train.jsonl?")
    assert "there is no folder" in problem(tmp_path / "none" / "a.jsonl")
    assert problem(tmp_path / "*.json").endswith("no file matches; correct the pattern")
    assert problem(tmp_path).endswith(f"is a folder; name its files, as in {tmp_path / '*.jsonl'}")
    assert Jsonl(path="???").problems() == ["dataset.path: not given; name a file, as in dataset.path=data/train.jsonl"]
    assert Jsonl(path=[]).problems() == ["dataset.path: an empty list; name a file"]
    assert Jsonl(path=str(tmp_path / "train.jsonl")).problems() == []


def test_the_digest_is_of_the_content(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"text": "one"})
    first = Jsonl(path=str(path)).digest()
    os.utime(path, (1, 1))
    assert Jsonl(path=str(path)).digest() == first
    stat = path.stat()
    write(path, {"text": "two"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as long as before, and as old
    assert Jsonl(path=str(path)).digest() != first


def test_the_digest_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.datasets.jsonl._HASHED_WHOLE", 10)
    monkeypatch.setattr("dtrain.datasets.jsonl._HASHED_AT_EACH_END", 5)
    path = tmp_path / "a.jsonl"
    digests = set()
    for content, time in ((b"a" * 20, 1), (b"b" + b"a" * 19, 1), (b"a" * 19 + b"b", 1), (b"a" * 20, 2), (b"a" * 21, 1)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        digests.add(Jsonl(path=str(path)).digest())
    assert len(digests) == 5


@pytest.mark.parametrize("values", [{"max_length": 1}, {"on_long": "ignore"}, {"packng": True}, {"path": 3.5j}])
def test_wrong_values_are_refused(values):
    with pytest.raises(ValidationError):
        Jsonl(**{"path": "a.jsonl", **values})
