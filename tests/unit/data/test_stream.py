"""Streams: the same samples for any number of ranks and however far ahead is read, and none lost where one goes on."""

import gzip
import itertools
import json
import shutil
import threading

import numpy as np
import pytest

from dtrain.config.spec import Span
from dtrain.data import head, stream, streaming
from dtrain.data.collate import collate
from dtrain.data.order import shuffled
from dtrain.data.prepare import prepare
from dtrain.data.prepared import FILES, read_prepared
from dtrain.data.stream import Along, Place, Shards
from dtrain.data.streaming import BLOB, StreamLoader, merged, open_streams
from dtrain.datasets import files
from dtrain.datasets.base import Text
from dtrain.datasets.files import Files
from dtrain.datasets.mixture import Mixture
from dtrain.errors import DataError
from dtrain.objectives.auto import Auto
from dtrain.plan.batch import BatchPlan
from dtrain.templates.jinja import Jinja
from tests.unit.data.fakes import FakeModel

NUM = 700
LENGTH = 48
PAD = 9999


def write(path, num=NUM, words=9):
    """Texts that all differ, some longer than a row."""
    with path.open("w") as file:
        for i in range(num):
            file.write(json.dumps({"text": f"{path.stem}-{i} " + "the cat sat on " * (i * 7 % words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stream") / "t.jsonl")


@pytest.fixture(params=["documents", "spans"])
def deal(request, monkeypatch):
    """How shards get their share: document by document, or spans of the file, of which there are then enough."""
    if request.param == "spans":
        monkeypatch.setattr(files, "_LEAST_BYTES", 100)
        monkeypatch.setattr(files, "_SPANS_A_SHARD", 40)
    return request.param


def make(path, cache, said=None, *, seed=3, fraction=0.02, **values):
    """The dataset, and the streams that ranks open of what was prepared of it."""
    kind = Mixture if "sources" in values else Files
    given = {"max_length": LENGTH, "streaming": True, "stream_shards": 6, "stream_buffer": 16, **values}
    dataset = kind(**given) if kind is Mixture else kind(path=str(path), **given)
    assert not dataset.problems()
    prepared = prepare(dataset, Auto(), FakeModel(), Jinja(), eval_fraction=fraction, seed=seed, cache=cache,
                       say=(said if said is not None else []).append)  # fmt: skip
    return prepared, dataset, open_streams(prepared, dataset, seed)


class Together:
    """The ranks of a run in one process."""

    def __init__(self, streams, size, batch, *, micro=2, samples=0, state=None):
        self.plan, self.samples = BatchPlan(batch, micro, size), samples
        self.ranks = [StreamLoader(streams, self.plan, rank=rank, pad_id=PAD, collate=collate, samples=samples, state=state)
                      for rank in range(size)]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.close()

    def step(self):
        """The samples of a step by their numbers, each with its tokens and targets."""
        windows = [rank.window(self.samples) for rank in self.ranks]
        self.samples += self.plan.global_batch
        assert len({len(window) for window in windows}) == 1, "ranks must make the same calls"
        assert all(len(batch.sample_ids) <= self.plan.micro_batch for window in windows for batch in window)
        found = {}
        for batch in itertools.chain.from_iterable(windows):
            for i, number in enumerate(batch.sample_ids):
                assert number not in found
                width = batch.inputs["tokens"].shape[1]
                mine = (batch.inputs["target_index"] // width == i).numpy()
                found[number] = (batch.inputs["tokens"][i].tolist(), batch.inputs["target_ids"][mine].tolist())
        return dict(sorted(found.items()))

    def saved(self, samples=None):
        """As a checkpoint has it, and what a run goes on from that is resumed from there."""
        samples = self.samples if samples is None else samples
        common = json.loads(json.dumps(self.ranks[-1].state(samples)))
        return merged(common, [rank.blobs(samples)[BLOB] for rank in self.ranks])


def content(step):
    """Without padding, whose width is that of the micro-batch."""
    return {number: ([t for t in tokens if t != PAD], targets) for number, (tokens, targets) in step.items()}


def run(streams, size, batch, steps, **values):
    with Together(streams, size, batch, **values) as ranks:
        return [content(ranks.step()) for _ in range(steps)]


@pytest.mark.parametrize("batch", [6, 7, 16])
def test_the_samples_of_a_step_are_the_same_on_any_number_of_ranks(path, tmp_path, deal, batch):
    *_, streams = make(path, tmp_path)
    expected = run(streams, 1, batch, 12)
    assert [list(step) for step in expected] == [list(range(i * batch, (i + 1) * batch)) for i in range(12)]
    for size in (2, 3, 4, 7):  # 4 does not divide the 6 shards, and 7 ranks are more than there are shards
        assert run(streams, size, batch, 12) == expected
    # However far ahead it is read: here nothing is.
    rows = [row.tokens.tolist() for row in streams.samples(12 * batch)]
    assert rows == [tokens for step in expected for tokens, _ in step.values()]


def test_another_seed_is_another_order_and_other_shards_too(path, tmp_path):
    firsts = []
    for i, values in enumerate([{}, {"seed": 4}, {"stream_shards": 5}, {"stream_buffer": 17}]):
        *_, streams = make(path, tmp_path / str(i), **values)
        firsts.append(str([row.tokens.tolist() for row in streams.samples(30)]))
    assert len(set(firsts)) == 4


def documents(window):
    for row in window.rows:
        ends = np.cumsum(row.lengths)
        yield from (
            tuple(row.tokens[end - length : end].tolist()) for end, length in zip(ends, row.lengths, strict=True)
        )


def pieces(prepared, dataset, streams, *, of=None):
    """What all documents should come to, but for those held out."""
    facts, source = prepared.streams["all"], streams.sources["all"]
    found = []
    for example in dataset.examples():
        if stream.share(example, source.encoder.seed) >= facts.held_below:
            encoded = source.encoder.encode([example], streams._tokenizer)
            starts = np.cumsum(encoded.lengths) - encoded.lengths
            found += [
                tuple((encoded.codes[s : s + n] >> 2).tolist()) for s, n in zip(starts, encoded.lengths, strict=True)
            ]
    return sorted(found)


def test_a_pass_has_every_document_once_and_the_next_in_another_order(path, tmp_path, deal):
    prepared, dataset, streams = make(path, tmp_path)
    facts, source = prepared.streams["all"], streams.sources["all"]
    shards = Shards(dataset, facts, source.encoder, streams._tokenizer, {s: Place() for s in range(6)})
    assert shards.deal.by_spans == (deal == "spans")
    passes = {0: [], 1: []}
    for shard in range(6):
        while (window := shards.window(shard)).start.epoch < 2:
            passes[window.start.epoch] += documents(window)
    expected = pieces(prepared, dataset, streams)
    assert len(set(expected)) > 600
    assert sorted(passes[0]) == sorted(passes[1]) == expected
    assert passes[0] != passes[1]
    deal = shards.deal
    assert deal.spans(0) != deal.spans(1) or not deal.by_spans
    assert [deal.shard_of(i, 0) for i in range(60)] != [deal.shard_of(i, 1) for i in range(60)]


def test_rows_are_well_filled(path, tmp_path):
    *_, streams = make(path, tmp_path, stream_buffer=64, stream_shards=2)
    rows = list(streams.samples(150))
    assert sum(len(row.tokens) for row in rows) / (150 * LENGTH) > 0.9


def test_nothing_is_repeated_or_lost_where_it_goes_on(path, tmp_path, deal):
    prepared, _, streams = make(path, tmp_path)
    rows_of_pass = prepared.num_epoch_rows
    steps = 3 * rows_of_pass // 7
    expected = run(streams, 1, 7, steps)
    # In the first window, in the middle of a pass, where one ends, and in the third.
    for stop in (0, 1, steps // 5, rows_of_pass // 7, rows_of_pass // 7 + 1, steps - 4):
        sizes = itertools.cycle([1, 3, 2, 7, 4])
        with Together(streams, next(sizes), 7) as ranks:
            for _ in range(stop):
                ranks.step()
            state = ranks.saved()
        assert state["consumed"]["all"]["samples"] == 7 * stop
        assert state["consumed"]["all"]["tokens"] == sum(len(t) for step in expected[:stop] for t, _ in step.values())
        # And once more a little later, so that a state that was gone on from is one to go on from.
        with Together(streams, next(sizes), 7, samples=7 * stop, state=state) as ranks:
            more = [content(ranks.step()) for _ in range(2)]
            state = ranks.saved()
        assert more == expected[stop : stop + 2]
        assert state["consumed"]["all"]["samples"] == 7 * (stop + 2)
        size = next(sizes)
        rest = run(streams, size, 7, min(12, steps - stop - 2), samples=7 * (stop + 2), state=state)
        assert rest == expected[stop + 2 : stop + 14]


def test_what_the_step_that_is_computed_began_with_can_be_saved_too(path, tmp_path):
    *_, streams = make(path, tmp_path)
    expected = run(streams, 2, 7, 12)
    with Together(streams, 3, 7) as ranks:
        for _ in range(9):
            ranks.step()
        before, after = ranks.saved(7 * 8), ranks.saved()
    assert before["consumed"]["all"]["samples"] == 7 * 8
    assert run(streams, 2, 7, 3, samples=7 * 8, state=before) == expected[8:11]
    assert run(streams, 2, 7, 3, samples=7 * 9, state=after) == expected[9:]


def test_what_it_goes_on_from_is_small_and_is_not_read_from_the_beginning(path, tmp_path, deal, monkeypatch):
    *_, streams = make(path, tmp_path)
    with Together(streams, 2, 6) as ranks:
        for _ in range(25):
            ranks.step()
        state = ranks.saved()
    assert len(json.dumps(state)) < 1000
    encoded = []
    encode = type(streams.sources["all"].encoder).encode
    monkeypatch.setattr(type(streams.sources["all"].encoder), "encode",
                        lambda self, examples, tokenizer: encoded.extend(examples) or encode(self, examples, tokenizer))  # fmt: skip
    with Together(streams, 2, 6, samples=150, state=state) as ranks:
        ranks.step()
        # At most the window in use and the one after it, of each shard.
        assert 0 < len(encoded) <= 6 * 2 * 16


def test_each_shard_is_read_by_one_rank_where_there_are_as_many(path, tmp_path):
    *_, streams = make(path, tmp_path)
    for size in (1, 2, 4, 6):
        read = [streams.read_by(rank, size) for rank in range(size)]
        assert sorted(itertools.chain.from_iterable(read)) == [(0, shard) for shard in range(6)]
        assert max(map(len, read)) - min(map(len, read)) <= 1
    assert [streams.read_by(rank, 7) for rank in range(7)] == [[(0, shard) for shard in range(6)]] * 7
    for size in (1, 2, 3, 6):  # the ranks' shares are as the plan says, up to one where they cannot be even
        for step in range(10):
            ranks = [streams.rank_of(turn, size) for turn in streams.turns(10 * step, 10)]
            assert {ranks.count(rank) for rank in range(size)} <= {10 // size, -(-10 // size)}


def test_of_one_shard_without_a_shuffle_the_tokens_are_those_of_the_file(path, tmp_path):
    prepared, dataset, streams = make(path, tmp_path, stream_shards=1, stream_buffer=1, fraction=0.0)
    rows = list(streams.samples(prepared.num_epoch_rows))
    source = streams.sources["all"]
    codes = np.concatenate(
        [source.encoder.encode([example], streams._tokenizer).codes for example in dataset.examples()]
    )
    assert np.concatenate([row.tokens for row in rows]).tolist() == (codes >> 2).tolist()
    assert len(rows) < sum(len(row.lengths) for row in rows) * 0.8  # packed all the same
    assert all(len(row.tokens) <= LENGTH for row in rows)


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_documents_are_never_trained_on(path, tmp_path, packing):
    prepared, _, streams = make(path, tmp_path, fraction=0.2, packing=packing)
    held = prepared.rows(FILES[1])
    held = {tuple(document) for i in range(len(held)) for document in documents(_Window([held.row(i)]))}
    assert 0.1 < prepared.streams["all"].num_held / NUM < 0.3
    trained = {
        document for row in streams.samples(prepared.num_epoch_rows * 2) for document in documents(_Window([row]))
    }
    (name,) = {document[:2] for document in held if document[:1] == prepared_name(streams)}
    firsts = {document[:6] for document in held if document[:2] == name}  # with the whole number of the document
    assert len(firsts) == prepared.streams["all"].num_held
    assert firsts.isdisjoint(document[:6] for document in trained)


def prepared_name(streams):
    """The first token of every document, and of no further piece of one."""
    return tuple(streams._tokenizer.encode("t-1")[:1])


class _Window:
    def __init__(self, rows):
        self.rows = rows


def test_rows_that_are_not_packed_have_one_document_each_and_like_lengths_together(path, tmp_path):
    *_, streams = make(path, tmp_path, packing=False)
    with Together(streams, 2, 8, micro=2) as ranks:
        for _ in range(5):
            for window in [rank.window(ranks.samples) for rank in ranks.ranks]:
                widths = [batch.inputs["tokens"].shape[1] for batch in window]
                assert widths == sorted(widths, reverse=True)
                assert all((batch.inputs["positions"][:, 0] == 0).all() for batch in window)
            ranks.samples += 8
    assert {len(row.lengths) for row in streams.samples(40)} == {1}


def test_a_shard_that_is_far_behind_reads_by_itself(path, tmp_path, monkeypatch):
    rows = lambda: (Text(f"f:{i}", f"{i}") for i in range(4000))  # noqa: E731
    owner = shuffled(4000, 1) % 4

    def read(limit):
        monkeypatch.setattr(stream, "WAITING_CHARS", limit)
        along = Along(rows(), lambda i: owner[i], dict.fromkeys(range(4), 0))
        mine = [along.next(0).source for _ in range(900)]
        return mine, [shard in along for shard in range(4)], along._chars

    patient, here, waiting = read(10**9)
    assert here == [True] * 4
    assert waiting > 100_000
    hasty, here, waiting = read(20_000)
    assert hasty == patient
    assert here == [True, False, False, False] or waiting <= 20_000
    # And in all, where hardly anything may wait:
    *_, streams = make(path, tmp_path)
    monkeypatch.setattr(stream, "WAITING_CHARS", 10**9)
    expected = run(streams, 2, 7, 20)
    monkeypatch.setattr(stream, "WAITING_CHARS", 1000)
    assert run(streams, 2, 7, 20) == expected


def test_what_waits_in_memory_does_not_grow(path, tmp_path, deal):
    *_, streams = make(path, tmp_path)
    with Together(streams, 2, 7) as ranks:
        for _ in range(60):  # some three passes
            ranks.step()
            held = [len(lane._windows) for rank in ranks.ranks for lane in rank._lanes.values()]
            assert max(held) <= 1  # and one that is made ahead
        assert sum(len(reader._along) for rank in ranks.ranks for reader in rank._readers) <= 2 * 6


def test_a_rank_that_waits_for_a_slow_source_is_known_to_get_on(path, tmp_path, monkeypatch):
    *_, streams = make(path, tmp_path)
    monkeypatch.setattr(streaming, "LOOK_S", 0.01)
    goes_on, told, read = threading.Event(), [], Files.read

    def slow(self, span):
        for i, example in enumerate(read(self, span)):
            if i == 30:
                assert goes_on.wait(120), "nobody was told"
            yield example

    def alive():
        told.append(1)
        goes_on.set()

    monkeypatch.setattr(Files, "read", slow)
    loader = StreamLoader(streams, BatchPlan(6, 6, 1), rank=0, pad_id=PAD, collate=collate, alive=alive)
    assert len(loader.window(0)[0].sample_ids) == 6
    loader.close()
    assert told


def test_what_became_of_the_examples_is_counted_once(tmp_path):
    path = write(tmp_path / "t.jsonl", 400)
    text = path.read_text().splitlines(keepends=True)
    text[7] = text[130] = '{"text": ""}\n'
    path.write_text("".join(text))
    *_, streams = make(path, tmp_path / "cache", on_bad_row="skip", stream_shards=3)
    with Together(streams, 4, 6) as ranks:  # several of which read the same shards
        while min(place[0] for place in ranks.saved()["at"].values()) < 1:
            ranks.step()
        state = ranks.saved()
    # Passes that are over, and what of the next is over too: shards differ a little.
    assert state["counts"]["bad, left out: `text` is empty"] in (2, 3, 4)
    assert 398 <= state["counts"]["read"] < 1.5 * 398
    with Together(streams, 1, 6, samples=ranks.samples, state=state) as again:
        assert again.saved()["counts"] == state["counts"]


@pytest.mark.parametrize("deal", ["spans"], indirect=True)
def test_a_bad_row_ends_it_with_file_and_line(tmp_path, deal):
    path = write(tmp_path / "t.jsonl")
    *_, streams = make(path, tmp_path / "cache", stream_shards=2)
    lines = path.read_text().splitlines(keepends=True)
    lines[600] = "{" + lines[600][1:-2].replace('"', "'") + "}\n"  # of the same length
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"t\.jsonl:601: not JSON.*dataset\.on_bad_row=skip"):
        run(streams, 1, 4, 200)


def test_too_many_bad_rows_end_it(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "COUNTED_CHARS", 0)
    monkeypatch.setattr(head, "TRIED_TOKENS", 1)
    path = write(tmp_path / "t.jsonl", 3000, words=2)
    lines = path.read_text().splitlines(keepends=True)
    lines[2000::20] = ['{"text": ""}\n'] * len(lines[2000::20])
    path.write_text("".join(lines))
    *_, streams = make(
        path, tmp_path / "cache", on_bad_row="skip", stream_shards=1, stream_buffer=2, max_bad_fraction=0.1
    )
    list(streams.samples(600))
    *_, streams = make(path, tmp_path / "cache2", on_bad_row="skip", stream_shards=1, stream_buffer=2,
                                      max_bad_fraction=0.016)  # fmt: skip
    with pytest.raises(DataError, match=r"dataset\.max_bad_fraction=0\.016: \d+ of .* rows are bad"):
        list(streams.samples(1480))


def test_data_that_changed_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl")
    prepared, dataset, _ = make(path, tmp_path / "cache")
    write(path, NUM + 1)
    with pytest.raises(DataError, match="is not on .* what it was when the run was prepared"):
        open_streams(prepared, dataset, 3)


def test_a_state_of_other_data_begins_the_stream(path, tmp_path):
    *_, streams = make(path, tmp_path / "a")
    with Together(streams, 1, 4) as ranks:
        for _ in range(3):
            ranks.step()
        state = ranks.saved()
    *_, other = make(path, tmp_path / "b", stream_buffer=20)
    fresh = [row.tokens.tolist() for row in other.samples(8)]
    with Together(other, 2, 4, samples=12, state=state) as ranks:
        found = [*ranks.step().items(), *ranks.step().items()]
        state = ranks.saved()
    assert [number for number, _ in found] == list(range(12, 20))
    assert [[t for t in tokens if t != PAD] for _, (tokens, _) in found] == fresh
    assert state["first"] == 12
    assert "from the beginning" in ranks.ranks[0].line


def test_a_small_dataset_has_fewer_shards_and_says_so(tmp_path):
    path = write(tmp_path / "t.jsonl", 150)
    prepared, *_ = make(path, tmp_path / "cache", stream_shards=64)
    assert prepared.streams["all"].shards == 2
    assert "a stream in 2 shards instead of 64, as there are only 150 documents" in "\n".join(prepared.lines())
    assert prepared.num_epoch_rows == prepared.num_rows


def test_prepared_once_and_again_for_what_the_rows_depend_on(path, tmp_path):
    said = []
    first, *_ = make(path, tmp_path, said)
    again, *_ = make(path, tmp_path, said)
    assert [line.split()[1] for line in said if line.startswith("data: ")].count("preparing") == 1
    assert again.dir == first.dir
    other, *_ = make(path, tmp_path, said, stream_buffer=17)
    assert other.digest != first.digest
    assert "dataset.stream_buffer was 16, is 17" in said[-1]
    (tmp_path / "elsewhere").mkdir()
    moved, *_ = make(shutil.copy(path, tmp_path / "elsewhere"), tmp_path)
    assert moved.digest == first.digest  # so that a run goes on with data that was moved
    read = read_prepared(first.dir, first.assets, Auto())
    assert read == first


def test_a_mixture_is_by_weights_of_tokens_and_goes_on(tmp_path):
    short, long = write(tmp_path / "short.jsonl", 800, words=2), write(tmp_path / "long.jsonl", 400, words=12)
    sources = {"short": {"path": str(short), "weight": 3}, "long": {"path": str(long), "weight": 1, "stream_shards": 3}}
    *_, streams = make(None, tmp_path / "cache", sources=sources, on_dry="repeat", packing=False)
    assert streams.num_shards == 9
    expected = run(streams, 1, 8, 60)
    for size in (2, 3, 4, 7):
        assert run(streams, size, 8, 12) == expected[:12]
    with Together(streams, 3, 8) as ranks:
        for _ in range(40):
            ranks.step()
        state = ranks.saved()
    assert run(streams, 2, 8, 20, samples=320, state=state) == expected[40:]
    assert state["consumed"]["short"]["samples"] + state["consumed"]["long"]["samples"] == 320
    assert sum(one["tokens"] for one in state["consumed"].values()) == sum(
        len(t) for step in expected[:40] for t, _ in step.values()
    )
    tokens = [0, 0]
    for turn, row in zip(streams.turns(0, 2048), streams.samples(2048), strict=True):
        tokens[turn.source] += len(row.tokens)
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


def test_what_a_mixture_of_streams_cannot_be():
    (problem,) = Mixture(sources={"a": {"dataset": "stdlib"}}, streaming=True).problems()
    assert problem.startswith("dataset.on_dry=stop: where a stream ends is not known")
    (problem,) = Mixture(sources={"a": {"dataset": "stdlib", "streaming": True}}).problems()
    assert problem.startswith("dataset.sources.a.streaming: the same for all rows of a run")


def rows_of(dataset):
    return [(dataset.told(source), row) for source, row in dataset.rows()]


@pytest.mark.parametrize(
    "name", ["t.jsonl", "t.txt", "t.jsonl.gz", "t.csv", "t.parquet", "t.arrow", "t.json", "wide.jsonl"]
)
def test_spans_are_all_of_the_rows_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "_LEAST_BYTES", 64)
    monkeypatch.setattr(files, "_MOST_BYTES", 150)
    path = tmp_path / name
    values = [f"row {i} größer " + "x" * (i * 13 % 90) for i in range(300)]
    if name.endswith(".txt"):
        path.write_text("\r\n".join(values))
    elif name == "t.csv":
        path.write_text("text,n\n" + "".join(f'"{value}\nmore",{i}\n' for i, value in enumerate(values)))
    elif name in ("t.parquet", "t.arrow"):
        import pyarrow as pa
        import pyarrow.feather
        import pyarrow.parquet

        table = pa.table({"text": values})
        if name == "t.parquet":
            pa.parquet.write_table(table, path, row_group_size=70)
        else:
            pa.feather.write_feather(table, path)
    else:
        lines = "".join(json.dumps({"text": value}, ensure_ascii=False) + "\n" + "\n" * (i % 3)
                        for i, value in enumerate(values))  # fmt: skip
        if name == "t.json":
            lines = json.dumps([{"text": value} for value in values])
        data = lines.encode("utf-16" if name.startswith("wide") else "utf-8")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    dataset = Files(path=str(path), streaming=True, **({"text_unit": "line"} if name == "t.txt" else {}))
    spans = dataset.spans()
    assert (len(spans) > 50) == (name in ("t.jsonl", "t.txt"))
    assert (len(spans) == 5) == (name == "t.parquet")
    found = [(dataset.told(source), row) for span in spans for source, row in dataset.rows_in(span)]
    assert found == rows_of(dataset)
    assert len(found) == 300


def test_spans_of_several_files_are_read_by_their_names(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", 20)
    dataset = Files(path=str(tmp_path), streaming=True)
    assert [span.name for span in dataset.spans()] == [str(tmp_path / f"{i}.jsonl") for i in range(3)]
    assert isinstance(dataset.spans()[0], Span)
    found = [example.texts().__next__() for span in dataset.spans() for example in dataset.read(span)]
    assert found == [example.text for example in dataset.examples()]
