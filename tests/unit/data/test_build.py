"""Rows of one dataset: the same however many processes make them, in memory that does not grow, whole or not at all."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.data import build as build_module
from dtrain.data import encode
from dtrain.data.documents import Documents, coded
from dtrain.data.prepare import prepare
from dtrain.data.rows import Row
from dtrain.data.store import RowStore
from dtrain.datasets.base import Text
from dtrain.datasets.files import Files
from dtrain.datasets.stdlib import Stdlib
from dtrain.errors import DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.pretrain import Pretrain
from dtrain.templates.jinja import Jinja
from tests.unit.data.fakes import FakeModel

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


def write(path, num, words=40):
    rows = [{"text": " ".join(["the cat sat on"] * (1 + (i * 7) % words)) + f" {i}"} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path, cache, said=None, **values):
    dataset = Files(**{"path": str(path), "max_length": 64, "on_long": "truncate", **values})
    say = (said if said is not None else []).append
    return prepare(dataset, Auto(), FakeModel(), Jinja(), eval_fraction=0.1, seed=0, cache=cache, say=say)


def contents(prepared):
    return {name: (prepared.dir / name).read_bytes() for name in ("train.arrow", "eval.arrow")}


@pytest.fixture
def many_chunks(monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(encode, "SMALL_CHARS", 4000)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_makes_the_same(tmp_path, many_chunks, monkeypatch, num_processes):
    path = write(tmp_path / "a.jsonl", 300)
    with path.open("a") as file:
        file.write('{"text": ""}\n' * 2)
    values = {"on_bad_row": "skip", "max_bad_fraction": 0.1}
    monkeypatch.setattr(encode, "num_cores", lambda: 1)
    alone = make(path, tmp_path / "one", **values)
    monkeypatch.setattr(encode, "num_cores", lambda: num_processes)
    together = make(path, tmp_path / "many", **values)
    assert contents(together) == contents(alone)
    for name in ("digest", "counts", "by_source", "first", "num_tokens", "num_targets", "fill"):
        assert getattr(together, name) == getattr(alone, name)
    assert list(together.counts) == list(alone.counts)
    assert together.counts["read"] == 300


def test_what_is_wrong_is_told_by_other_processes_too(tmp_path, many_chunks, monkeypatch):
    path, told = write(tmp_path / "a.jsonl", 300), []
    for num_processes in (1, 2):
        monkeypatch.setattr(encode, "num_cores", lambda num=num_processes: num)
        with pytest.raises(DataError) as caught:
            make(path, tmp_path / "cache", on_long="error")
        told.append(str(caught.value))
    assert told[0] == told[1]
    lines = told[0].splitlines()
    assert re.match(r"dataset: 2\d\d bad rows", lines[0])
    assert lines[1].startswith(f"  {path}:")
    assert not list((tmp_path / "cache").glob("*data*"))


def told_before(begin, *args):
    for signum in (signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), signum)
    begin(*args)


def test_signals_for_this_process_do_not_end_those_that_start(tmp_path, many_chunks, monkeypatch, capfd):
    """A terminal's and Slurm's go to all, also to one that has come no further than to import."""

    def pool(num, context, initializer, initargs):
        return ProcessPoolExecutor(num, context, initializer=told_before, initargs=(initializer, *initargs))

    monkeypatch.setattr(encode, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(encode, "num_cores", lambda: 2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert make(write(tmp_path / "a.jsonl", 300), tmp_path / "cache").counts["read"] == 300
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert capfd.readouterr().err == ""


def test_packing_in_windows_leaves_nothing_out(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", 200)
    whole = make(path, tmp_path / "whole")
    monkeypatch.setattr(build_module, "WINDOW", 64)
    windows = make(path, tmp_path / "windows")
    stores = [RowStore(one.dir / "train.arrow") for one in (whole, windows)]
    lengths = [sorted(n for i in range(len(store)) for n in store.row(i).lengths.tolist()) for store in stores]
    assert lengths[0] == lengths[1]
    assert whole.num_tokens == windows.num_tokens
    assert whole.num_targets == windows.num_targets == int(stores[1].num_targets.sum())
    assert len(stores[1]) <= len(stores[0]) + 4  # a row that is not full for each window


def test_documents_come_back(tmp_path):
    with Documents(tmp_path / "documents") as documents:
        tokens, targets = np.arange(9, dtype=np.int32) + 2**28, np.arange(9) % 2 == 1
        rows = [Row(tokens[part], targets[part], np.array(lengths, np.int32))
                for part, lengths in ((slice(4), [4]), (slice(4, 9), [2, 3]), (slice(2), [2]))]  # fmt: skip
        codes = [coded(row) for row in rows]
        labels = np.array([7, -1, 3], np.int32)
        documents.add(np.concatenate(codes[:2]), np.array([4, 5], np.int32), np.array([0.25, 0.5]), labels[:2])
        documents.add(codes[2], np.array([2], np.int32), np.array([0.75]), labels[2:])
        documents.flush()
        assert documents.lengths.tolist() == [4, 5, 2]
        assert documents.shares.tolist() == [0.25, 0.5, 0.75]
        row = documents.row(np.array([2, 1]), np.array([9, 4]))
        assert row.tokens.tolist() == [*tokens[:2], *tokens[4:]]
        assert row.targets.tolist() == [*targets[:2], *targets[4:]]
        assert row.lengths.tolist() == [2, 2, 3]
        assert row.labels.tolist() == [3, -1]
        assert (row.tokens.dtype, row.targets.dtype) == (np.int32, np.bool_)
    assert not list(tmp_path.iterdir())


PARALLEL = """
import sys
from pathlib import Path
from dtrain.data import encode
from tests.unit.data.test_build import make
if __name__ == "__main__":
    encode.CHUNK_CHARS, encode.SMALL_CHARS = 20_000, 20_000
    encode.num_cores = lambda: 2
    make(sys.argv[1], Path(sys.argv[2]))
"""


def test_no_process_outlives_a_build_that_is_killed(tmp_path):
    path = write(tmp_path / "a.jsonl", 20_000)
    script = tmp_path / "script.py"
    script.write_text(PARALLEL)
    builder = subprocess.Popen([sys.executable, script, path, tmp_path / "cache"], env=ENV)
    try:
        process, children = psutil.Process(builder.pid), []
        deadline = time.monotonic() + 120
        while len(children) < 3:  # two that encode, and Python's tracker of resources
            assert builder.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            children = process.children(recursive=True)
        builder.kill()
        builder.wait()
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not alive
    finally:
        builder.kill()
    assert not list((tmp_path / "cache").glob("data-*"))


@spec
class Numbers(Stdlib):
    """So many texts of a few characters, and of a thousand tokens each."""

    num: int

    def examples(self):
        return (Text(f"numbers:{i}", str(i)) for i in range(self.num))

    def digest(self):
        return str(self.num)


@spec
class Thousand(Pretrain):
    encode_many = ObjectiveSpec.encode_many

    def encode(self, example, tokenizer):
        return Row(np.arange(1000, dtype=np.int32), np.arange(1000) > 0, np.array([1000], np.int32))


def peak(num, cache):
    """Bytes of memory that a process had at most which prepared so much."""
    prepare(Numbers(num=num, max_length=2048), Thousand(), FakeModel(), Jinja(), eval_fraction=0.1, seed=0, cache=cache,
            say=lambda line: None)  # fmt: skip
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_memory_does_not_grow_with_the_data(tmp_path):
    peaks = []
    for num in (1_000, 25_000):
        code = (
            f"from pathlib import Path; from tests.unit.data.test_build import peak; print(peak({num}, Path('{num}')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=ENV, check=True, cwd=tmp_path, capture_output=True, text=True
        )
        peaks.append(int(done.stdout))
    size = next((tmp_path / "25000").rglob("train.arrow")).stat().st_size
    assert size > 25_000 * 0.85 * 1000 * 5  # a token and whether it is a target are 5 bytes
    assert peaks[1] - peaks[0] < size / 2, peaks


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from dtrain.data.prepared import problem_of
from tests.unit.data.test_build import contents, make

path, cache = sys.argv[1], Path(sys.argv[2])
whole = make(path, cache)
shutil.rmtree(whole.dir)
began = time.monotonic()
make(path, cache)
took = time.monotonic() - began
expected, name = contents(whole), whole.dir.name
draw, killed = random.Random(0), 0
while killed < 20:
    shutil.rmtree(cache / name, ignore_errors=True)
    child = os.fork()
    if not child:
        make(path, cache)
        os._exit(0)
    time.sleep(draw.uniform(0, took))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    problem = problem_of(cache / name)
    assert problem in (None, ""), problem
    assert problem == "" or contents(whole) == expected
again = make(path, cache)
assert again.digest == whole.digest and contents(again) == expected
left = [each for each in os.listdir(cache) if each.startswith((".", "data"))]
assert left == [name], left
"""


def test_a_build_that_is_killed_at_any_moment_leaves_nothing_that_is_taken_for_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", 400)
    subprocess.run([sys.executable, "-c", KILLED, path, tmp_path / "cache"], check=True,
                   env=ENV | {"TOKENIZERS_PARALLELISM": "false"})  # fmt: skip


def test_how_far_it_is_and_how_long_it_will_take():
    meter = encode._Meter(size=1000)
    meter.began -= 10
    line = meter.line(encode.Encoded(num_examples=3, num_bytes=250, codes=np.zeros(5000, np.int32)))
    assert line == "tokenising: 3 documents, 0.0 M tokens, 0 k tokens/s; about 25% done, 30 s left"
    assert "left" not in encode._Meter(size=None).line(encode.Encoded(num_bytes=250))
    assert [encode._time(seconds) for seconds in (99, 100, 6000, 9000)] == ["99 s", "2 min", "1.7 h", "2.5 h"]
