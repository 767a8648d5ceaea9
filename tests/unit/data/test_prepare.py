import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.data.build import hold_out
from dtrain.data.encode import share
from dtrain.data.prepare import Prepared, prepare
from dtrain.data.store import RowStore
from dtrain.data.tokenizer import TextTokenizer
from dtrain.datasets.base import Text
from dtrain.datasets.files import Files
from dtrain.datasets.stdlib import Stdlib
from dtrain.errors import DataError
from dtrain.objectives.auto import Auto
from dtrain.objectives.classifier import Classifier
from dtrain.objectives.pretrain import Pretrain
from dtrain.objectives.sft import SFT
from dtrain.templates.jinja import Jinja
from tests.unit.data.fakes import CHATML, FakeModel


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(num, words=20):
    return [{"text": " ".join(["the cat sat on"] * (1 + (i * 7) % words)) + f" {i}"} for i in range(num)]


def chats(num):
    return [{"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "the cat"}]}
            for i in range(num)]  # fmt: skip


def make(
    path, cache, said=None, *, objective=None, model=None, template=None, eval_fraction=0.0, seed=0, **values
) -> Prepared:
    dataset = Files(**{"path": str(path), "max_length": 64, **values})
    notes = [f"data: {note}" for note in dataset.notes()]

    def say(line):
        if said is not None and line not in notes:
            said.append(line)

    return prepare(dataset, objective or Auto(), model or FakeModel(), template or Jinja(), eval_fraction=eval_fraction,
                   seed=seed, cache=cache, say=say)  # fmt: skip


def left(cache):
    """What a cache has, but for what is known of the model's template."""
    return sorted(each.name for each in cache.iterdir() if not each.name.startswith("template-"))


def documents(prepared, name="train"):
    """The text of each document of each row."""
    tokenizer = TextTokenizer.load(prepared.assets)
    store = RowStore(prepared.dir / f"{name}.arrow")
    for i in range(len(store)):
        row = store.row(i)
        ends = np.cumsum(row.lengths)
        for start, end in zip(ends - row.lengths, ends, strict=True):
            yield tokenizer.decode(row.tokens[start:end].tolist())


def test_texts(tmp_path):
    rows = texts(40)
    prepared = make(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", on_long="error", max_length=200)
    assert sorted(documents(prepared)) == sorted(row["text"] + "<|eos|>" for row in rows)
    store = RowStore(prepared.dir / "train.arrow")
    assert len(store) == prepared.num_rows
    assert max(len(store.row(i).tokens) for i in range(len(store))) <= 200
    assert prepared.objective == Pretrain()
    assert prepared.num_targets == prepared.num_tokens - 40 == int(store.num_targets.sum())
    assert prepared.fill == prepared.num_tokens / (prepared.num_rows * 200) > 0.9
    assert (prepared.num_eval_rows, prepared.num_documents, prepared.pad_id) == (0, 40, 1)
    assert prepared.counts == {"read": 40}
    first, second = prepared.lines()
    assert f" tokens, {prepared.num_targets:,} of them targets; 0 rows held out" in first
    assert second == "data: documents: 40 read"
    # Where a target is a text, no token is one.
    of_texts = dataclasses.replace(prepared, objective=Classifier(labels=("a", "b")))
    assert of_texts.lines()[0].endswith(f"; {prepared.num_tokens:,} tokens; 0 rows held out")


def test_chats(tmp_path):
    prepared = make(write(tmp_path / "a.jsonl", chats(3)), tmp_path / "cache", packing=False)
    assert prepared.objective == SFT()
    assert prepared.num_rows == 3
    row = RowStore(prepared.dir / "train.arrow").row(2)
    tokenizer = TextTokenizer.load(prepared.assets)
    assert tokenizer.decode(row.tokens[row.targets].tolist()) == "the cat<|im_end|>"
    assert tokenizer.decode(row.tokens.tolist()).startswith("<|im_start|>user\nhello 2<|im_end|>")


def test_long_documents(tmp_path):
    text = " ".join(["the cat sat on"] * 60)
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "the dog"}])
    split = make(path, tmp_path / "cache")
    num = len(TextTokenizer.load(split.assets).encode(text)) + 1
    assert "".join(piece for piece in documents(split) if "dog" not in piece) == text + "<|eos|>"
    assert split.counts == {"read": 2, "split at 64 tokens": 1}
    cut = make(path, tmp_path / "cache", on_long="truncate")
    assert cut.counts == {"read": 2, "truncated to 64 tokens": 1, "tokens cut off": num - 64}
    dropped = make(path, tmp_path / "cache", on_long="drop")
    assert dropped.counts == {"read": 2, "left out: over 64 tokens": 1}
    assert list(documents(dropped)) == ["the dog<|eos|>"]
    with pytest.raises(DataError, match=rf"a.jsonl:1: {num} tokens, over dataset.max_length=64"):
        make(path, tmp_path / "cache", on_long="error")


def test_a_long_chat_is_truncated_and_left_out_where_nothing_is_learned(tmp_path):
    rows = chats(1)
    rows.append({"messages": [{"role": "user", "content": "the cat " * 99}, {"role": "assistant", "content": "a"}]})
    prepared = make(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    assert prepared.num_documents == 1
    assert prepared.counts["truncated to 64 tokens"] == prepared.counts["left out: no token to learn"] == 1


def test_what_nobody_has_filled_in_is_counted(tmp_path):
    """A name in double braces, and not what workflows and formulas have there."""
    rows = chats(4)
    rows[1]["messages"][1]["content"] = "I am {{name}}, made by {{ author }}; {{name}}."
    rows[2]["messages"][0]["content"] = "你好{{name}}"
    rows[3]["messages"][1]["content"] = "${{ secrets.KEY }} x^{{a}} \\frac{{b}}{c} {{{d}}} {{1}} {{ e f }} {{% if g %}}"
    path = write(tmp_path / "a.jsonl", rows)
    prepared = make(path, tmp_path / "cache", max_length=128)
    assert prepared.counts == {"read": 4, "with {{author}}": 1, "with {{name}}": 2}
    assert prepared.lines()[-3:] == [
        f"data:   with {{{{author}}}}: at {path}:2",
        f"data:   with {{{{name}}}}: at {path}:2, {path}:3",
        "data:   names in double braces are taken as they stand: fill them in where that is not meant",
    ]


def test_nothing_left(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "the cat " * 99}, {"role": "assistant", "content": "a"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"nothing left to train on: 1 read, 1 truncated .* 1 left out: no token to learn"
    ):
        make(path, tmp_path / "cache")
    with pytest.raises(DataError, match="nothing left to train on: 1 read, 1 left out: over 64 tokens"):
        make(path, tmp_path / "cache", on_long="drop")
    with pytest.raises(DataError, match="no rows at all"):
        make(write(tmp_path / "b.jsonl", []), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*data*")) == list((tmp_path / "cache").glob(".tmp*")) == []


def test_rows_that_cannot_be_masked_are_told_together(tmp_path):
    rows = chats(9)
    for row in rows[1:8]:
        del row["messages"][1]
    with pytest.raises(DataError) as caught:
        make(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0] == "dataset: 7 bad rows; repair or remove, or set dataset.on_bad_row=skip:"
    assert (
        lines[1] == f"  {tmp_path}/a.jsonl:2: no message to learn: objective.train_on=assistant, and the roles are user"
    )
    assert lines[-1] == "  ... and 2 more"


def test_no_template(tmp_path):
    with pytest.raises(DataError, match=r"model.path: .* has no chat template") as caught:
        make(write(tmp_path / "a.jsonl", chats(9)), tmp_path / "cache", model=FakeModel(template=None))
    assert len(str(caught.value).splitlines()) == 1


def test_the_second_time_it_is_there(tmp_path):
    path, cache, said = write(tmp_path / "a.jsonl", texts(9)), tmp_path / "cache", []
    first = make(path, cache, said)
    assert make(path, cache, said) == first
    assert said == [
        f"data: preparing {first.dir}: nothing is prepared yet",
        f"data: reusing {first.dir}: nothing that the rows depend on has changed",
    ]


def test_what_changes_the_rows_makes_them_anew(tmp_path):
    path, cache, said = write(tmp_path / "a.jsonl", texts(9)), tmp_path / "cache", []
    dirs = [make(path, cache, said).dir]
    for values, reason in (
        ({"max_length": 32}, "dataset.max_length was 64, is 32"),
        ({"packing": False}, "dataset.packing was True, is False"),
        ({"eval_fraction": 0.5}, "eval.fraction was 0.0, is 0.5"),
        ({"seed": 1}, "run.seed was 0, is 1"),
        ({"objective": Pretrain()}, "objective was Auto, is Pretrain"),
    ):
        dirs.append(make(path, cache, said, **values).dir)
        assert reason in said[-1]
    write(tmp_path / "a.jsonl", texts(10))
    dirs.append(make(path, cache, said).dir)
    assert "content of the dataset changed" in said[-1]
    (cache / "fake" / "chat_template.jinja").write_text(CHATML + " ")
    dirs.append(make(path, cache, said).dir)
    assert said[-1].endswith("tokenizer changed")
    assert len(set(dirs)) == len(dirs)


def test_another_kind_of_dataset_is_told_without_what_only_the_one_has(tmp_path):
    cache, said = tmp_path / "cache", []
    make(write(tmp_path / "a.jsonl", texts(9)), cache)
    prepare(Stdlib(max_files=5), Auto(), FakeModel(), Jinja(), eval_fraction=0.0, seed=0, cache=cache, say=said.append)
    reason = next(line for line in said if "preparing" in line)
    assert "dataset was Files, is Stdlib" in reason
    assert "dataset.max_length was 64, is 256" in reason
    assert "None" not in reason


def test_the_digest_is_of_the_rows(tmp_path):
    a = make(write(tmp_path / "a.jsonl", texts(9)), tmp_path / "one")
    b = make(write(tmp_path / "b.jsonl", texts(9)), tmp_path / "two")
    c = make(write(tmp_path / "c.jsonl", texts(10)), tmp_path / "two")
    assert a.digest == b.digest != c.digest


@pytest.mark.parametrize("damage", ["short", "missing", "meta", "no meta"])
def test_damaged_data_is_made_anew(tmp_path, damage):
    path, cache, said = write(tmp_path / "a.jsonl", texts(9)), tmp_path / "cache", []
    first = make(path, cache)
    train, meta = first.dir / "train.arrow", first.dir / "meta.json"
    if damage == "short":
        train.write_bytes(train.read_bytes()[:-1])
    elif damage == "missing":
        train.unlink()
    elif damage == "meta":
        meta.write_text(meta.read_text()[:50])
    else:
        meta.unlink()
    assert make(path, cache, said) == first
    assert ("train.arrow" if damage in ("short", "missing") else "meta.json") in said[0]
    assert left(cache) == sorted([first.dir.name, "fake"])


def test_held_out_documents_are_chosen_by_their_text(tmp_path):
    rows = texts(200)
    first = make(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", eval_fraction=0.2, max_length=512)
    train, held = set(documents(first)), set(documents(first, "eval"))
    assert not train & held
    assert len(train | held) == 200
    assert 20 < len(held) < 60
    again = make(write(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "cache", eval_fraction=0.2, max_length=512)
    assert set(documents(again, "eval")) == held
    fewer = make(write(tmp_path / "c.jsonl", rows[:100]), tmp_path / "cache", eval_fraction=0.2, max_length=512)
    assert set(documents(fewer, "eval")) <= held
    other = make(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", eval_fraction=0.2, max_length=512, seed=1)
    assert set(documents(other, "eval")) != held


def test_hold_out_by_hand():
    def held(shares, fraction):
        return hold_out(np.array(shares), fraction).tolist()

    assert held([0.5, 0.05, 0.9, 0.05], 0.1) == [False, True, False, True]
    assert held([0.5, 0.3, 0.9, 0.3], 0.1) == [False, True, False, True]  # at least one text: the lowest
    assert held([0.1, 0.2, 0.3], 0.99) == [True, True, False]  # never all: the highest stays
    assert held([0.1, 0.2], 0.0) == [False, False]
    assert held([0.1], 0.5) == held([0.1, 0.1], 0.5)[:1] == [False]  # one text only


def test_shares_are_even():
    shares = [share(Text("a:1", f"text {i}"), 0) for i in range(2000)]
    assert abs(np.mean(np.array(shares) < 0.1) - 0.1) < 0.03


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"run.cache=.*choose a folder"):
        make(write(tmp_path / "a.jsonl", texts(3)), tmp_path / "cache" / "deeper")


@spec
class Killed(Pretrain):
    encode_many = ObjectiveSpec.encode_many

    def encode(self, example, tokenizer):
        if example.source.endswith(":5"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(example, tokenizer)


def start(*args, **values):
    process = multiprocessing.get_context("spawn").Process(target=make, args=args, kwargs=values)
    process.start()
    return process


def test_a_killed_build_leaves_nothing(tmp_path):
    path, cache = write(tmp_path / "a.jsonl", texts(9)), tmp_path / "cache"
    process = start(path, cache, objective=Killed())
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(cache.glob(".tmp-*"))) == 1
    assert not list(cache.glob("data-*"))
    prepared = make(path, cache)
    assert left(cache) == sorted([prepared.dir.name, "fake"])


def make_and_tell(path, cache, out):
    said = []
    make(path, cache, said)
    out.write_text("\n".join(said))


def test_launches_at_once_build_once(tmp_path):
    path, cache = write(tmp_path / "a.jsonl", texts(300)), tmp_path / "cache"
    FakeModel().assets(lambda: [], cache)
    outs = [tmp_path / str(i) for i in range(3)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=make_and_tell, args=(path, cache, out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    told = [out.read_text() for out in outs]
    assert sum("preparing" in text for text in told) == 1
    assert sum("reusing" in text for text in told) == 2
    said = []
    prepared = make(path, cache, said)
    assert said == [f"data: reusing {prepared.dir}: nothing that the rows depend on has changed"]
    assert left(cache) == sorted([prepared.dir.name, "fake"])


def test_nothing_slow_is_imported():
    code = (
        "import sys, dtrain.data.prepare, dtrain.datasets.files, dtrain.datasets.stdlib;"
        "slow = {'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers', 'jinja2', 'numpy'} & set(sys.modules);"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_text_is_packed_tightly(tmp_path, request):
    source = request.config.rootpath.parent / "shared" / "data" / "c4_demo.jsonl"
    if not source.exists():
        pytest.skip("no c4_demo.jsonl beside the checkout")
    prepared = make(source, tmp_path / "cache", max_length=2048)
    assert prepared.counts["read"] == len(source.read_text().splitlines())
    assert prepared.fill > 0.98
