"""From shards to files and back, for any division of the one and of the other."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dtrain.checkpoint import manifest
from dtrain.checkpoint.storage import ALIGN, HostBuffer, Part, Reader, file_name, parts, write_file
from dtrain.errors import CheckpointError
from dtrain.strategies.base import Shard
from tests.unit.checkpoint.synthetic import Tensors, describe, shards, tensors, write

SHAPES = {"a": (3, 4, 5), "norm": (7,), "b": (6, 10), "scale": ()}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())


@settings(deadline=None)
@given(st.integers(1, 5 * ALIGN), st.integers(1, 5), st.integers(0, 9))
def test_replicas_write_everything_once(numel: int, replicas: int, index: int) -> None:
    view = torch.arange(numel, dtype=torch.float32)
    found = []
    for replica in range(replicas):
        shard = Shard("x", (numel + 9,), 4, {"weight": view}, replica, replicas)
        found += parts([shard], {"x": index})
    assert sorted(at for part in found for at in range(part.start, part.start + part.view.numel())) == [
        *range(4, 4 + numel)
    ]
    assert all(torch.equal(part.view, view[part.start - 4 :][: part.view.numel()]) for part in found)
    assert len(found) <= -(-numel // ALIGN)  # a small one has one writer


def test_small_parameters_go_round_the_replicas() -> None:
    names = [f"p{i}" for i in range(12)]
    order = {name: i for i, name in enumerate(names)}
    written = Counter(
        replica
        for replica in range(4)
        for _ in parts((Shard(name, (8,), 0, {"weight": torch.zeros(8)}, replica, 4) for name in names), order)
    )
    assert written == {0: 3, 1: 3, 2: 3, 3: 3}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(st.integers(0, TOTAL), max_size=4), st.integers(1, 3), st.data())
def test_any_range_out_of_any_division(tmp_path_factory, cuts: list[int], replicas: int, data) -> None:
    of = tensors(SHAPES)
    folder = write(tmp_path_factory.mktemp("c"), 5, of, cuts=cuts, replicas=replicas)
    reader = Reader(folder, manifest.read(folder))
    for name, states in of.items():
        numel = states["weight"].numel()
        start = data.draw(st.integers(0, numel))
        out = torch.full((data.draw(st.integers(0, numel - start)),), math.nan)
        for state, whole in states.items():
            reader.read_into(name, state, start, out)
            assert torch.equal(out, whole.reshape(-1)[start : start + out.numel()])
    reader.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(st.integers(0, TOTAL), max_size=3), st.integers(0, 10**6), st.booleans(), st.randoms())
def test_what_is_read_is_proven_in_any_order(tmp_path_factory, cuts: list[int], place: int, flip: bool, draw) -> None:
    of = tensors(SHAPES)
    folder = write(tmp_path_factory.mktemp("c"), 5, of, cuts=cuts)
    read = manifest.read(folder)
    file = draw.choice(list(read.files))
    raw = bytearray((folder / file).read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    if flip and begin < len(raw):  # in the data: a header that makes no sense is refused
        raw[begin + place % (len(raw) - begin)] ^= 1
        (folder / file).write_bytes(raw)
    reader = Reader(folder, read, prove=read.files)
    some = [(name, state) for name, states in of.items() for state in states]
    draw.shuffle(some)
    for name, state in some[: draw.randrange(len(some) + 1)]:
        start = draw.randrange(of[name][state].numel())
        reader.read_into(name, state, start, torch.empty(draw.randrange(of[name][state].numel() - start + 1)))
    wrong = [f"{folder / file}: its content differs"] if flip and begin < len(raw) else []
    assert [problem[: len(wrong[0])] for problem in reader.problems()] == wrong
    reader.close()


def test_what_is_needed_in_order_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other half of the file for its digest alone."""
    of = tensors({"a": (80, 40), "b": (80, 40), "c": (5000, 99)})
    folder = write(tmp_path, 1, of, cuts=[])
    read, num_bytes, preadv = manifest.read(folder), [0], os.preadv

    def counted(handle: int, into: list[memoryview], at: int) -> int:
        count = preadv(handle, into, at)
        num_bytes[0] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    reader = Reader(folder, read, prove=read.files)
    for name, states in of.items():
        for state, whole in states.items():
            out = torch.empty(whole.numel() // 2)
            reader.read_into(name, state, whole.numel() // 4, out)
            assert torch.equal(out, whole.reshape(-1)[whole.numel() // 4 :][: out.numel()])
    assert reader.problems() == []
    assert num_bytes == [read.num_bytes]
    reader.close()


def test_a_file_that_is_lost_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, whose handles can go stale."""
    folder = write(tmp_path, 1, tensors({"a": (8, 4)}), cuts=[9])
    read = manifest.read(folder)
    reader = Reader(folder, read, prove=[file_name(1)])

    def stale(handle: int) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", stale)
        (problem,) = reader.problems()
    assert problem == f"{folder / file_name(1)}: cannot be read ({os.strerror(errno.ESTALE)})"
    reader.close()


def test_a_rank_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    """Whatever lies in other ranks' files may be gone."""
    of = tensors({"a": (8, 4), "b": (8, 4)})
    folder = write(tmp_path, 1, of, cuts=[32])
    reader = Reader(folder, manifest.read(folder))
    (folder / file_name(1)).unlink()
    out = torch.empty(5)
    reader.read_into("a", "exp_avg", 3, out)
    assert torch.equal(out, of["a"]["exp_avg"].reshape(-1)[3:8])
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: cannot be read \(No such file"):
        reader.read_into("b", "weight", 0, out)
    reader.close()


def test_plain_tools_read_it(tmp_path: Path) -> None:
    of = tensors({"a": (4, 6)}, states=["weight"])
    folder = write(tmp_path, 1, of, cuts=[9], blobs={"rng": b"\x01\x02\x03"})
    # Elements 0 to 9 are a row of 6 and half a row; 9 to 24 the rest of it and two rows.
    held = {}
    for rank in range(2):
        with safe_open(folder / file_name(rank), framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys() if name != "rng"}  # noqa: SIM118  no mapping
            assert file.get_tensor("rng").tolist() == [1, 2, 3]
    rows = of["a"]["weight"]
    expected = {
        "weight:a@0,0": rows[:1],
        "weight:a@1,0": rows[1:2, :3],
        "weight:a@1,3": rows[1:2, 3:],
        "weight:a@2,0": rows[2:],
    }
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)


def test_size_and_digest_are_of_the_file(tmp_path: Path) -> None:
    part = Part("a", "weight", (100,), 0, torch.randn(100))
    said = write_file(tmp_path / "f", [part], {"rng": b"abc"})
    raw = (tmp_path / "f").read_bytes()
    assert (said.bytes, said.xxh3) == (len(raw), xxhash.xxh3_64_hexdigest(raw))


def test_copies_are_of_the_moment_and_write_the_same(tmp_path: Path) -> None:
    of = tensors(SHAPES)
    mine = parts(shards(of, [])[0], {name: i for i, name in enumerate(of)})
    write_file(tmp_path / "live", mine, {"rng": b"x"})
    buffer = HostBuffer()
    copies = buffer.take(mine)
    for states in of.values():
        for whole in states.values():
            whole.add_(1)
    write_file(tmp_path / "copy", copies, {"rng": b"x"})
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "live").read_bytes()
    memory = copies[0].view.untyped_storage().data_ptr()
    again = buffer.take(mine)
    assert again[0].view.untyped_storage().data_ptr() == memory
    assert all(torch.equal(copy.view, part.view) for copy, part in zip(again, mine, strict=True))


def test_what_a_rank_keeps_for_itself(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, tensors(SHAPES), cuts=[50], blobs={"rng.torch": bytes(range(9)), "empty": b""})
    reader = Reader(folder, manifest.read(folder))
    assert reader.blobs(file_name(1)) == {"rng.torch": bytes(range(9)), "empty": b""}
    assert reader.blobs(file_name(7)) == {}
    reader.close()


def _made_of(tmp_path: Path, of: Tensors, division: list[list[Shard]]) -> tuple[Path, manifest.Manifest]:
    order = {name: i for i, name in enumerate(of)}
    files = {
        file_name(rank): write_file(tmp_path / file_name(rank), parts(mine, order), {})
        for rank, mine in enumerate(division)
    }
    return tmp_path, dataclasses.replace(describe(of, 1), files=files)


@pytest.mark.parametrize(("ranks", "said"), [
    ([0, 1], r"weight of b is not whole: element 10 of its 20 is not there"),
    ([0, 2], r"weight of a is not whole: element 6 of its 20 is not there"),
    ([1, 2], r"weight of a is not whole: element 0 of its 20 is not there"),
    ([0, 1, 1, 2], r"weight of a is there twice from element 6 on, in rank-00002"),
    ([0, 1, 2, 2], r"weight of b is there twice from element 10 on, in rank-00003"),
    ([0, 0, 1, 2], r"weight of a is there twice from element 0 on, in rank-00001"),
])  # fmt: skip
def test_a_piece_that_is_missing_or_there_twice(tmp_path: Path, ranks: list[int], said: str) -> None:
    of = tensors({"a": (4, 5), "b": (20,)})
    whole = shards(of, [6, 30])
    with pytest.raises(CheckpointError, match=said):
        Reader(*_made_of(tmp_path, of, [whole[rank] for rank in ranks]))


def test_a_parameter_of_a_size_that_no_memory_has(tmp_path: Path) -> None:
    of = tensors({"a": (4,)})
    folder, said = _made_of(tmp_path, of, shards(of, []))
    huge = {"b": manifest.Parameter((10**12, 10**12), ("weight",), "b")}
    with pytest.raises(CheckpointError, match="weight of b is not whole: element 0 of its 1,000,000,000,000,000,000,"):
        Reader(folder, dataclasses.replace(said, parameters={**said.parameters, **huge}))


def test_pieces_that_overlap(tmp_path: Path) -> None:
    of = tensors({"a": (20,)})
    with pytest.raises(CheckpointError, match="weight of a is there twice from element 8 on"):
        Reader(*_made_of(tmp_path, of, [shards(of, [12])[0], shards(of, [8])[1]]))


@pytest.mark.parametrize("told", [
    {"a": manifest.Parameter((3, 5), ("weight",), "a")},  # a row less
    {"a": manifest.Parameter((20,), ("weight",), "a")},
    {"c": manifest.Parameter((4, 5), ("weight",), "c")},
    {"a": manifest.Parameter((4, 5), ("exp_avg",), "a")},
])  # fmt: skip
def test_files_of_another_model(tmp_path: Path, told: dict) -> None:
    of = tensors({"a": (4, 5)}, states=["weight"])
    folder, said = _made_of(tmp_path, of, shards(of, []))
    with pytest.raises(
        CheckpointError, match=r"rank-00000.*: weight:a@0,0 is no part of a parameter of this checkpoint"
    ):
        Reader(folder, dataclasses.replace(said, parameters=told))


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:7], lambda raw: raw[:40], lambda raw: raw[:-1], lambda raw: b"\xff" * 8 + raw[8:],
    lambda raw: raw.replace(b'"F32"', b'"F33"'), lambda raw: raw.replace(b"[4,5]", b"[4,6]"), lambda raw: raw.replace(b"{", b"[", 1),
    lambda raw: raw.replace(b"data_offsets", b"data_offsetz"),
])  # fmt: skip
def test_a_header_that_is_wrong(tmp_path: Path, damage) -> None:
    of = tensors({"a": (4, 5)}, states=["weight"])
    folder, said = _made_of(tmp_path, of, shards(of, []))
    path = folder / file_name(0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot be read as safetensors"):
        Reader(folder, said)


def test_a_header_with_one_byte_changed(tmp_path: Path) -> None:
    """Whatever it then says is refused, or told from its digest."""
    of = tensors({"a": (4, 5), "b": (3, 1), "scale": ()}, states=["weight"])
    folder, said = _made_of(tmp_path, of, shards(of, [6]))
    path = folder / file_name(1)
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    torn = 0
    for place, byte in enumerate(raw[:length]):
        for changed in {*(byte ^ 1 << bit for bit in range(8)), *b"e-.9 I"} - {byte}:
            path.write_bytes(raw[:place] + bytes([changed]) + raw[place + 1 :])
            try:
                reader = Reader(folder, said, prove=said.files)
            except CheckpointError:
                torn += 1
            else:
                assert [one.startswith(f"{path}: its content differs") for one in reader.problems()] == [True]
                reader.close()
    assert torn > 4 * length


@pytest.mark.parametrize(("before", "after"), [
    (b"weight:a@1,2", b"weight:a@1-2"), (b"weight:a@1,2", b"weight:a@-1,"), (b"[2,5]", b"[10.]"), (b"[2,5]", b"[010]"),
    (b"[12,52]", b"[9e999]"), (b"[12,52]", b"[NaN,9]"),
])  # fmt: skip
def test_a_header_that_is_no_longer_of_the_checkpoint(tmp_path: Path, before: bytes, after: bytes) -> None:
    of = tensors({"a": (4, 5)}, states=["weight"])
    folder, said = _made_of(tmp_path, of, shards(of, [7]))
    path = folder / file_name(1)
    raw = path.read_bytes()
    assert before in raw
    path.write_bytes(raw.replace(before, after))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: "):
        Reader(folder, said)


def test_a_share_of_a_copy_keeps_no_more_than_itself() -> None:
    # As moments in 8 bits are shown: opened on the host, of a weight that is elsewhere.
    shown = torch.arange(100_000, dtype=torch.float32)
    shard = Shard("x", (100_000,), 0, {"weight": torch.empty(100_000, device="meta"), "exp_avg": shown}, 1, 4)
    of_state = {part.state: part for part in parts([shard], {"x": 0})}
    kept = of_state["exp_avg"]
    assert 0 < kept.view.numel() < 100_000
    assert torch.equal(kept.view, shown[kept.start : kept.start + kept.view.numel()])
    assert kept.view.untyped_storage().nbytes() == 4 * kept.view.numel()
