"""What `dtrain data` shows and says, from small files and the model that is made of them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dtrain.cli import run as dtrain
from dtrain.data.rows import Row
from dtrain.data.store import RowStore
from dtrain.data.tokenizer import TextTokenizer
from dtrain.plan.propose import propose
from dtrain.verbs import launch
from dtrain.verbs._data_pieces import documents, visible
from dtrain.verbs._data_policy import limit
from dtrain.verbs._data_preview import Shown, lines
from dtrain.verbs._data_stats import Rows, bins
from tests.unit.data.fakes import write_tokenizer

CHATS = [
    ("How do you do?", "Fine, thank you.\nAnd you?"),
    ("谢谢你", "不客气 👩‍👩‍👧 naïve"),
    ("<b>bold</b> & 'quoted'", '<script>alert("1")</script> &amp; </span>'),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _chats(path: Path, pairs: list[tuple[str, str]] = CHATS) -> str:
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in pairs]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"dataset.path={path}"


class _Said:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str, code: int = 0) -> str:
        """What is printed; of an error, what is said of it."""
        found = dtrain(["data", *argv])
        out, err = self._capsys.readouterr()
        assert found == code, out + err
        return err if found == 2 else out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> _Said:
    return _Said(capsys)


def _opened(text: str, part: str = "train") -> tuple[RowStore, TextTokenizer]:
    """What was prepared last, by what was said of it."""
    folder = Path([line for line in text.splitlines() if line.startswith(("data: preparing", "data: reusing"))][-1]
                  .split()[2].rstrip(":"))  # fmt: skip
    assets = next(Path("runs/.cache").glob("tiny-*"))
    return RowStore(folder / f"{part}.arrow"), TextTokenizer.load(assets)


def test_preview_marks_what_is_trained(said: _Said, tmp_path: Path) -> None:
    text = said("preview", _chats(tmp_path / "a.jsonl"), "--rows", "1", "eval.fraction=0")
    assert "data: 1 rows of up to 1,024 tokens" in text
    assert "objective: sft train_on=assistant; template=auto" in text
    assert "\x1b" not in text
    shown = text[text.index("legend:") :]
    assert shown.count("--- document") == 3
    # The answers and the token that ends their turn, and nothing else.
    body = shown[shown.index("---") :]
    assert sorted(part.split("]]")[0] for part in body.split("[[")[1:]) == sorted(
        f"{answer}<|im_end|>" for _, answer in CHATS
    )
    for question, _ in CHATS:
        assert f"<|im_start|>user\n{question}<|im_end|>\n" in shown
    store, _ = _opened(text)
    row = store.row(0)
    num, trained = len(row.tokens), row.num_targets
    assert f"row 0 of 1 to train on: {num} tokens ({trained} trained, {num - trained} context) in 3 documents" in shown
    assert f"{1024 - num} tokens below dataset.max_length" in shown


def test_preview_of_ids_is_the_prepared_row(said: _Said, tmp_path: Path) -> None:
    """All of it: place, id and mask of each token; overrides and options in any order."""
    data = _chats(tmp_path / "a.jsonl", [*CHATS, *((f"question {i}", f"answer {i}") for i in range(9))])
    text = said("preview", data, "--row", "1", "eval.fraction=0", "--ids", "dataset.max_length=60")
    store, _ = _opened(text)
    assert len(store) > 2
    table = [line for line in text.splitlines() if line[:7].strip().isdigit()]
    row = store.row(1)
    assert [int(line[:7]) for line in table] == list(range(len(row.tokens)))
    assert [int(line[7:15]) for line in table] == row.tokens.tolist()
    assert [line[16] == "T" for line in table] == row.targets.tolist()
    assert f"document 1 of {len(row.lengths)}: {row.lengths[0]} tokens" in text


def test_preview_of_what_is_held_out(said: _Said, tmp_path: Path) -> None:
    data = _chats(tmp_path / "a.jsonl")
    text = said("preview", data, "--eval")
    assert "row 0 of 1 to evaluate on" in text
    assert text.count("--- document") == 1
    assert said("preview", data, "--eval", "eval.fraction=0", code=2).startswith("error: --eval: no rows are held out")


def test_colours(said: _Said, tmp_path: Path) -> None:
    text = said("preview", _chats(tmp_path / "a.jsonl", [("a", "b\nc"), ("a", "b\nc")]), "--color")
    # The end of a trained line is trained too, and the colour does not go over it.
    assert "\x1b[30;42mb⏎\x1b[0m\n\x1b[30;42mc<|im_end|>\x1b[0m" in text
    assert "[[" not in text


def test_other_marks_where_the_data_has_these(said: _Said, tmp_path: Path) -> None:
    text = said("preview", _chats(tmp_path / "a.jsonl", [("a[[0]]", "b]]")] * 2))
    assert "legend: {{{trained}}} context" in text
    assert "{{{b]]<|im_end|>}}}" in text


def test_data_does_not_steer_the_terminal(said: _Said, tmp_path: Path) -> None:
    data = _chats(tmp_path / "a.jsonl", [("\x1b[31mred\r\x07", "\u202eturned\x9b1m")] * 2)
    for option in ("--rows=1", "--ids"):
        text = said("preview", data, option)
        assert not {"\x1b", "\r", "\x07", "\u202e", "\x9b"} & set(text)
    assert visible("\x1b[31mé\n\t👩‍👧") == "\\x1b[31mé\n\t👩‍👧"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[tuple[str, str, str]] = []
        """Class, title and text of each."""
        self.text = ""
        self._at: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span" and (found := dict(attrs)).get("title"):
            self._at.append(found)
            self.tokens.append((str(found["class"]), str(found["title"]), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._at:
            self._at.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._at:
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = (kind, title, text + data)


def test_html_is_the_row_and_nothing_else(said: _Said, tmp_path: Path) -> None:
    name = tmp_path / "<script>x.jsonl"
    text = said("preview", _chats(name).replace("=", "='", 1) + "'", "eval.fraction=0", "--html", "a.html")
    assert text.endswith("wrote a.html: 1 row\n")
    source = Path("a.html").read_text(encoding="utf-8")
    page = _Page(source)
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "p", "span", "section"}
    assert "http" not in source.replace("http-equiv", "")  # nothing to fetch
    assert str(name) in page.text
    store, tokenizer = _opened(text)
    row = store.row(0)
    shown = "".join(part for _, _, part in page.tokens)
    assert shown.replace("⏎", "") == tokenizer.decode(row.tokens.tolist())
    marked = [kind == "trained" for kind, title, _ in page.tokens for _ in _ids(title)]
    assert marked == row.targets.tolist()
    assert [token for _, title, _ in page.tokens for token in _ids(title)] == row.tokens.tolist()
    with_ids = said("preview", f"dataset.path='{name}'", "eval.fraction=0", "--html", "b.html", "--ids")
    assert "reusing" in with_ids
    assert f"<sub>{row.tokens[0]}</sub>" in Path("b.html").read_text(encoding="utf-8")


def _ids(title: str) -> list[int]:
    return [int(token) for token in title.split("id ")[1].split(",")[0].split()]


def test_pieces_put_characters_together(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
    texts = ["the 谢谢 👩‍👧 grüße\ufffd", "\ufffd\ufffd", " two  spaces "]
    ids = [tokenizer.encode(text) for text in texts]
    tokens = np.array([token for each in ids for token in each], np.int32)
    lengths = np.array([len(each) for each in ids], np.int32)
    targets = np.zeros(len(tokens), np.bool_)
    whole = list(documents(Row(tokens, targets, lengths), tokenizer))
    assert ["".join(piece.text for piece in document) for document in whole] == texts
    assert "谢" in [piece.text for piece in whole[0]]
    assert len(tokenizer.encode("谢")) == 3
    # A mask that begins within a character: neither part is shown as the other.
    at = next(piece for piece in whole[0] if piece.text.endswith("谢"))
    cut = at.at + len(at.ids) - 1
    targets[cut:] = True
    pieces = [piece for document in documents(Row(tokens, targets, lengths), tokenizer) for piece in document]
    assert next(piece for piece in pieces if piece.at == cut).text.startswith("\ufffd")
    assert [token for piece in pieces for token in piece.ids] == tokens.tolist()
    assert [piece.trained for piece in pieces for _ in piece.ids] == targets.tolist()
    assert [piece.at for piece in pieces] == np.cumsum([0, *(len(piece.ids) for piece in pieces)])[:-1].tolist()


def test_a_token_that_is_no_character_yet_is_shown(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
    ids = np.array(tokenizer.encode("谢"), np.int32)
    row = Row(ids, np.array([False, True, True]), np.array([3], np.int32))
    text = list(lines([Shown("row", row, list(documents(row, tokenizer)), "none")], color=False, ids=True))
    assert [line.split()[:2] for line in text[4:-1]] == [[str(i), str(token)] for i, token in enumerate(ids)]


def _texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"dataset.path={path}"


def test_stats_are_those_of_the_rows(said: _Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _chats(tmp_path / "a.jsonl", [*CHATS, ("more", "of it " * 200), CHATS[1], CHATS[0], CHATS[1]])
    argv = ["stats", data, "eval.fraction=0", "dataset.max_length=80"]
    text = said(*argv, "--png", "a.png")
    store, _ = _opened(text)
    rows = [store.row(i) for i in range(len(store))]
    tokens, targets = sum(len(row.tokens) for row in rows), sum(int(row.targets.sum()) for row in rows)
    lengths = sorted(length for row in rows for length in row.lengths.tolist())
    assert dtrain(["data", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "data: reusing" in err
    found = json.loads(out)
    train = found["train"]
    assert (train["rows"], train["documents"], train["tokens"], train["targets"]) == (len(rows), 7, tokens, targets)
    assert train["duplicates"] == 3  # two of the second, one of the first
    assert (train["lengths"]["least"], train["lengths"]["most"], train["lengths"]["median"]) == (
        lengths[0],
        80,
        lengths[3],
    )
    assert [each["documents"] for each in train["histogram"]] == [
        sum(each["from"] <= length <= each["to"] for length in lengths) for each in train["histogram"]
    ]
    assert found["eval"]["documents"] == found["overlap"] == 0
    assert found["examples"]["read"] == 7
    assert list(found["examples_by_source"]) == [str(tmp_path / "a.jsonl")]
    assert found["first"]["truncated to 80 tokens"] == [f"{tmp_path / 'a.jsonl'}:4"]
    assert found["examples"]["truncated to 80 tokens"] == 1
    assert found["fill"] == tokens / (80 * len(rows))
    assert f"trained     {targets:,} of {tokens:,} tokens ({targets / tokens:.2%})" in text
    assert "duplicates  3 of 7 documents (42.86%)" in text
    assert "1 truncated to 80 tokens" in text
    assert text.endswith("wrote a.png\n")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_a_mixture_is_the_rows_of_all_its_sources(said: _Said, tmp_path: Path) -> None:
    _chats(tmp_path / "a.jsonl")
    _texts(tmp_path / "b.jsonl", ["only text here", "and more of it"])
    data = "dataset.sources={one:{path:a.jsonl},two:{path:b.jsonl,max_bad_fraction:0.5}}"
    argv = ["dataset=mixture", data, "eval.fraction=0", "dataset.max_length=100"]
    text = said("preview", *argv, "--rows", "9")
    assert "to train on, from one: " in text
    last = [line for line in text.splitlines() if line.startswith("row ")][-1]
    num = int(last.split(" of ")[1].split()[0])
    assert "to train on, from two: " in said("preview", *argv, "--row", str(num - 1))
    found = json.loads(said("stats", *argv, "--json"))
    assert (found["train"]["rows"], found["train"]["documents"]) == (num, 5)
    assert found["examples"]["read"] == 5
    assert len(found["examples_by_source"]) == 2
    said("check", *argv)


def test_overlap_is_found_in_the_tokens(said: _Said, tmp_path: Path) -> None:
    """Texts that differ are on two sides; what is left of them when they are cut off is the same."""
    argv = [_texts(tmp_path / "a.jsonl", [f"{'the same ' * 9}{i}" for i in range(20)]), "eval.fraction=0.4"]
    whole = said("stats", *argv)
    assert "overlap     0 of" in whole
    assert "duplicates  0 of" in whole
    held_out = int(whole.split("to train on, ")[2].split()[0])
    assert 0 < held_out < 20
    cut = said("stats", *argv, "dataset.max_length=4", "dataset.on_long=truncate")
    assert f"overlap     {held_out} of {held_out} documents held out (100.00%)" in cut
    assert f"duplicates  {19 - held_out} of {20 - held_out} documents" in cut


def test_bins() -> None:
    def of(*lengths: int) -> list[tuple[int, int, int]]:
        return bins(Rows(0, 0, 0, np.array(lengths, np.int32), np.empty(0, np.uint64)))

    assert of() == []
    assert of(2, 2, 3) == [(1, 1, 0), (2, 2, 2), (3, 3, 1)]
    # 25 in at most twelve steps: each of three, the last from 25 to 27.
    assert of(1, 3, 4, 25) == [(1, 3, 2), (4, 6, 1), *((k, k + 2, 0) for k in range(7, 25, 3)), (25, 27, 1)]


def test_check_keeps_or_breaks_each_limit(said: _Said, tmp_path: Path) -> None:
    """Of 9 rows one is cut off, one cannot be used, and one repeats another."""
    data = _chats(tmp_path / "a.jsonl", [*CHATS, *((f"q {i}", f"a {i}") for i in range(3)), CHATS[1],
                                         ("more", "of it " * 200)])  # fmt: skip
    with Path("a.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "alone"}]}\n')
    argv = ["check", data, "eval.fraction=0", "dataset.max_length=80", "dataset.on_bad_row=skip",
            "dataset.max_bad_fraction=0.5"]  # fmt: skip
    text = said(*argv, code=1)
    verdicts = {line.split()[1]: line.split()[0] for line in text.splitlines() if line.startswith(("kept", "broken"))}
    assert verdicts == {
        "--max-truncated": "broken",
        "--max-skipped": "broken",
        "--min-trained": "kept",
        "--max-duplicates": "broken",
        "--max-overlap": "kept",
    }
    assert "1 truncated to 80 tokens" in text.split("broken  --max-truncated")[1].splitlines()[0]
    assert "bad, left out: " in text.split("broken  --max-skipped")[1].splitlines()[0]
    assert text.endswith("3 of 5 limits broken\n")
    enough = ["--max-truncated", "12.5%", "--max-skipped", "1", "--max-duplicates", "1"]
    assert said(*argv, *enough).endswith("all limits kept\n")
    for i, less in ((1, "11%"), (3, "0"), (5, "12%")):
        assert said(*argv, *enough[:i], less, *enough[i + 1 :], code=1).endswith("1 of 5 limits broken\n")
    assert "broken  --min-trained 99%" in said(*argv, *enough, "--min-trained", "99%", code=1)


def test_check_of_what_is_on_both_sides(said: _Said, tmp_path: Path) -> None:
    argv = ["check", _texts(tmp_path / "a.jsonl", [f"{'the same ' * 9}{i}" for i in range(20)]), "eval.fraction=0.4"]
    assert said(*argv).endswith("all limits kept\n")
    cut = ["dataset.max_length=4", "dataset.on_long=truncate", "--max-truncated=100%", "--max-duplicates=100%"]
    assert said(*argv, *cut, code=1).count("broken") == 2  # the line of it, and the last
    assert said(*argv, *cut, "--max-overlap=100%").endswith("all limits kept\n")


def test_a_last_token_by_itself_is_no_lost_row(said: _Said, tmp_path: Path) -> None:
    data = _texts(tmp_path / "a.jsonl", ["one two three", "four five six"])
    text = said("stats", data, "eval.fraction=0", "--json")
    length = json.loads(text)["train"]["lengths"]["most"]
    argv = ["check", data, "eval.fraction=0", f"dataset.max_length={length - 1}"]
    split = said(*argv)
    assert "left out: no token to learn" in split
    assert "kept    --max-skipped 0: 0 of" in split


def test_limits() -> None:
    assert not limit("1%").above(1, 100)
    assert limit("1%").above(2, 100)
    assert not limit("5%").below(5, 100)
    assert limit("5%").below(4, 100)
    assert not limit("12").above(12, 1)
    assert limit("12").above(13, 1)
    assert limit("0%").above(1, 10**9)
    assert not limit("0").above(0, 0)
    assert not limit("5%").below(0, 0)
    for text in ("", "x", "1.5", "-1", "101%", "%", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            limit(text)


@pytest.mark.parametrize(("argv", "words"), [
    (["check", "--max-skipped", "some"], "some: neither a share such as 1% nor a number such as 12"),
    (["stats", "--max-skipped", "1"], "--max-skipped: is not for `dtrain data stats`, but for `dtrain data check`"),
    (["check", "dataset.path=nowhere.jsonl"], "nowhere.jsonl"),
    (["stats", "--png", "none/a.png"], "--png none/a.png: there is no folder none"),
    (["preview", "--json"], "--json: is not for `dtrain data preview`, but for `dtrain data stats`"),
    (["preview", "--row", "1"], "--row 1: there are rows 0 to 0"),
    (["preview", "--row", "-1"], "--row -1: there are rows 0 to 0"),
    (["preview", "--rows", "0"], "--rows 0: must be at least 1"),
    (["preview", "--rows", "1", "--row", "1"], "--row: not allowed with argument --rows"),
    (["preview", "--html", "none/a.html"], "--html none/a.html: there is no folder none"),
    (["preview", "--html", "."], "--html .: is a folder"),
    (["preview", "--html", "a.html", "--color"], "--color: not allowed with argument --html"),
    (["build", "--html", "a.html", "--ids"], "--ids: is not for `dtrain data build`, but for `dtrain data preview`"),
    (["preview", "dataset.max_lenght=3"], "dataset.max_lenght"),
    (["preview", "dataset.path=nowhere.jsonl"], "nowhere.jsonl"),
    (["look"], "invalid choice: 'look'"),
])  # fmt: skip
def test_wrong_input(said: _Said, tmp_path: Path, argv: list[str], words: str) -> None:
    text = said(*argv, _chats(tmp_path / "a.jsonl") if "dataset.path" not in str(argv) else "run.seed=1", code=2)
    assert words in text
    assert "Traceback" not in text


def test_what_cannot_be_written_is_told_before_anything_is_prepared(said: _Said, tmp_path: Path) -> None:
    said("preview", _chats(tmp_path / "a.jsonl"), "--html", "none/a.html", code=2)
    assert not Path("runs").exists()


def test_build_makes_what_a_launch_finds(said: _Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [_chats(tmp_path / "a.jsonl"), "dataset.max_length=64", "run.seed=3", "template=chatml",
                 "run.cache=elsewhere", "objective.train_on=all", "batch.global_batch=2"]  # fmt: skip
    text = said("build", *overrides)
    assert "data: preparing" in text
    assert "nothing is prepared yet" in text
    folder = text.splitlines()[-1].removeprefix("rows: ")
    assert Path(folder, "train.arrow").is_file()
    launch.prepare_all(propose(overrides, None))
    assert f"data: reusing {folder}" in capsys.readouterr().out
    assert "data: reusing" in said("build", *overrides)
    assert "dataset.max_length was 64, is 32" in said("build", *overrides, "dataset.max_length=32")


def test_without_torch(tmp_path: Path) -> None:
    """In an interpreter of its own; so that it answers at once, and on a machine for which torch is not made."""
    data = _chats(tmp_path / "a.jsonl")
    code = f"""
import contextlib, io, sys
from dtrain.cli import run
for argv in (["preview", {data!r}], ["stats", "--png", "a.png", "--json", {data!r}], ["check", {data!r}]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert run(["data", *argv]) == 0, out.getvalue() + err.getvalue()
print([name for name in ("torch", "transformers", "deepspeed", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dtrain(["data", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("preview", "build", "--html FILE", "KEY=VALUE"):
        assert word in text
