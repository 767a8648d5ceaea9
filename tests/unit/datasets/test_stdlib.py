import sysconfig

from dtrain.datasets.base import Skipped, Text
from dtrain.datasets.stdlib import Stdlib


def test_there_is_text_on_every_machine():
    examples = list(Stdlib(max_files=40).examples())
    assert len(examples) == 40
    assert [example.source for example in examples] == sorted(example.source for example in examples)
    assert examples[0].source == "__future__.py:1"
    assert all(not name.source.startswith(("site-packages", "test/")) for name in examples)
    assert sum(len(example.text) for example in examples if isinstance(example, Text)) > 100_000


def test_what_is_left_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "a.py").write_text("pass\n")
    (tmp_path / "b.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "c.py").write_text("#" * 200_001)
    (tmp_path / "d.py").write_text("")
    assert list(Stdlib().examples()) == [
        Text("a.py:1", "pass\n"),
        Skipped("b.py", "file is not UTF-8"),
        Skipped("c.py", "file over 200 kB"),
        Skipped("d.py", "file is empty"),
    ]
    before = Stdlib().digest()
    assert Stdlib().digest() == before
    (tmp_path / "a.py").write_text("pass\n\n")
    assert Stdlib().digest() != before
