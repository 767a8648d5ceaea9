"""Rows that cannot be used: told by file and line before any rank starts, or left out and counted when that is asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from pathlib import Path

import pytest

from dtrain.cli import run
from dtrain.data import encode
from tests.e2e.command import SMALL, write_texts

GOOD = 60
# What stands in the file after the good rows, and what is said of it; a line that is no mistake has nothing.
CORRUPT = {
    "bad line": (b"{text}\n", "61: not JSON: Expecting property name enclosed in double quotes at column 2"),
    "truncated last line": (b'{"text": "cut o', "61: not JSON: Unterminated string starting at at column 10"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}\n', "61: not UTF-8: byte 14 of the line"),
    "NUL": (b'{"text": "a\0b"}\n', "61: not JSON: Invalid control character at at column 12"),
    "escaped NUL": (b'{"text": "a\\u0000b"}\n', "61: `text` has a NUL: at character 2"),
    "duplicate key": (b'{"text": "a", "text": "b"}\n', "61: a key is there twice: `text`"),
    "type change": (b'{"text": 5}\n', "61: `text` is a number instead of a string"),
    "null": (b'{"text": null}\n', "61: `text` is null instead of a string"),
    "missing key": (b'{"txt": "a"}\n', "61: no `text`: the rows are read as text (text), and this one has `txt`"),
    "huge line": (b'{"text": "' + b"a" * 3000 + b'"}\n', "61: longer than dataset.max_row_bytes=2000"),
    "half a surrogate pair": (b'{"text": "\\ud800"}\n', "61: `text` has half a surrogate pair"),
    "CRLF and blank lines": (b'\r\n{"text": "one more row of text"}\r\n\r\n', ""),
}
TYPED = [*SMALL, "dataset.path=rows.jsonl", "dataset.max_row_bytes=2000", "train.steps=2", "launcher.procs=1"]


def _kill_one(ended: threading.Event) -> None:
    """Of the processes that this one starts from now on the first that has something to do."""
    import psutil

    this = psutil.Process()
    before = {child.pid for child in this.children()}
    while not ended.wait(0.01):
        for child in this.children():
            with contextlib.suppress(psutil.Error):
                if child.pid not in before and child.cpu_times().user > 0.2:
                    child.kill()
                    return


@pytest.mark.slow
def test_a_process_that_tokenises_is_killed(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a system that is short of memory: nothing is started, nothing is left, and it is told."""
    monkeypatch.setattr(encode, "num_cores", lambda: 2)
    rows.write_bytes(b"".join(b'{"text": "%d %s"}\n' % (i, b"the cat sat " * 100) for i in range(2000)))
    ended = threading.Event()
    killer = threading.Thread(target=_kill_one, args=[ended])
    killer.start()
    try:
        assert run(["launch", *TYPED]) == 2
    finally:
        ended.set()
        killer.join()
    said = capsys.readouterr().err
    assert "dataset: a process that tokenises was ended from outside, as happens where memory runs out; " in said
    assert not list(Path("runs").glob("[!.]*"))
    assert not list(Path("runs/.cache").glob("data-*")) + list(Path("runs/.cache").glob(".tmp*"))


def test_no_room_for_processes_that_tokenise(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's word, where /dev/shm is full: it is not the disk of the cache."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode, "num_cores", lambda: 2)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", full)
    rows.write_bytes(b"".join(b'{"text": "%d %s"}\n' % (i, b"the cat sat " * 100) for i in range(1000)))
    assert run(["data", "build", *TYPED]) == 2
    said = capsys.readouterr().err
    assert "no processes that tokenise can be started: No space left on device; look at /dev/shm" in said


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    write_texts(path, GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # the mark that some editors put in front is no mistake
    return path


def _add(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_row(rows: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, expected = CORRUPT[what]
    _add(rows, data)
    if expected:
        assert run(["launch", *TYPED]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: dataset: 1 bad row; repair or remove, or set dataset.on_bad_row=skip:\n")
        assert f"\n  rows.jsonl:{expected}" in said
        assert "Traceback" not in said
        assert not list(Path("runs").glob("[!.]*"))
    else:
        assert run(["data", "build", *TYPED]) == 0
        assert "61 read" in capsys.readouterr().out


def test_all_of_them(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first five by line, and how many of each reason; left out where that was asked for and they are few."""
    data = b"".join(data for what, (data, _) in CORRUPT.items() if not what.startswith("truncated"))
    _add(rows, data)
    assert run(["launch", *TYPED]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: dataset: 10 bad rows; ")
    assert re.findall(r"^  rows.jsonl:(\d+): ", said, re.MULTILINE) == ["61", "62", "63", "64", "65"]
    assert "\n  ... and 5 more\n" in said
    assert "in all: 2 not JSON, 1 not UTF-8, " in said
    typed = [*TYPED, "dataset.on_bad_row=skip"]
    assert run(["data", "build", *typed, "dataset.max_bad_fraction=0.14"]) == 2
    said = capsys.readouterr().err
    assert "dataset.max_bad_fraction=0.14: 10 of 71 rows are bad, which is 14.1%; repair them, or raise it:\n" in said
    assert run(["data", "build", *typed, "dataset.max_bad_fraction=0.141"]) == 0
    assert "61 read, 2 bad, left out: not JSON, 1 bad, left out: not UTF-8, " in capsys.readouterr().out


def test_what_is_left_out_is_in_the_manifest(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _add(rows, b"{text}\n")
    assert run(["launch", *TYPED, "dataset.on_bad_row=skip", "dataset.max_bad_fraction=0.1", "run.name=skip"]) == 0
    data = json.loads(Path("runs/skip/manifest.json").read_text())["data"]
    assert data["counts"] == {"read": GOOD, "bad, left out: not JSON": 1}
    assert data["first"] == {"bad, left out: not JSON": ["rows.jsonl:61"]}


NOTHING = {
    "no file content": (b"", [], "dataset: no rows at all"),
    "blank lines": (b"\n \n\n", [], "dataset: no rows at all"),
    "all rows too long": (b'{"text": "a b c d e f g h i j k l m n o p q r s t u v w x y z"}\n' * 3,
                          ["dataset.max_length=4", "dataset.on_long=drop"], "3 read, 3 left out: over 4 tokens"),
    "nothing to learn": (b'{"messages": [{"role": "user", "content": "a"}]}\n' * 3, [], "no message to learn"),
    "all rows bad": (b"{\n" * 3, ["dataset.on_bad_row=skip"], "3 of 3 rows are bad, which is 100.0%"),
    "all rows bad, and all may be": (b"{\n" * 3, ["dataset.on_bad_row=skip", "dataset.max_bad_fraction=1"],
                                     "dataset: no rows at all; 3 skipped: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_train_on(rows: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, typed, expected = NOTHING[what]
    rows.write_bytes(data)
    assert run(["launch", *TYPED, *typed]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not list(Path("runs").glob("[!.]*"))
