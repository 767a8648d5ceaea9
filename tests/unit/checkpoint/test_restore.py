"""Who proves which file, and what is refused before anything is filled."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.manifest import File, Manifest, Parameter
from dtrain.checkpoint.restore import restore, share
from dtrain.checkpoint.storage import file_name
from dtrain.errors import CheckpointError
from dtrain.strategies.base import Shard
from tests.processes import run_ranks
from tests.unit.checkpoint.synthetic import STATES, tensors, write
from tests.unit.models.test_attention import Solo


def _of(rank: int, size: int) -> Solo:
    comm = Solo()
    comm.rank, comm.size = rank, size
    return comm


def test_every_file_is_proven_once_and_by_its_rank_where_there_are_as_many() -> None:
    for size in range(1, 8):
        for num in range(8):
            files = {file_name(i): File(i, "0" * 16) for i in range(num)}
            shares = [share(files, _of(rank, size)) for rank in range(size)]
            assert [name for one in shares for name in one] == list(files)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            if num == size:
                assert [[*one] for one in shares] == [[name] for name in files]


def _refused(folders: list[Path], parameters: dict[str, Parameter],
             wanted: Callable[[Manifest], list[str]] = lambda read: []) -> tuple[str, list[str]]:  # fmt: skip
    said: list[str] = []
    nothing: Any = None  # is asked of the strategy before that
    with pytest.raises(CheckpointError) as raised:
        restore(folders, nothing, parameters, wanted, Solo(), said.append)
    return str(raised.value), said


def test_all_that_does_not_fit_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, tensors({"a": (4, 5), "b": (7,), "c": (2,)}))
    parameters = {
        "a": Parameter((4, 6), STATES, "a"),
        "b": Parameter((7,), STATES, "b"),
        "d": Parameter((1,), STATES, "d"),
    }
    assert _refused([folder], parameters)[0].splitlines() == [
        f"{folder}: not of this model:",
        "  a: of shape (4, 5) in the checkpoint, (4, 6) here",
        "  d: of shape none in the checkpoint, (1,) here",
        "  c: in the checkpoint, not in the model",
    ]


def test_what_says_too_little_of_where_it_was_is_passed_over(tmp_path: Path) -> None:
    folders = [write(tmp_path, step, tensors({"a": (4,)})) for step in (4, 2)]

    def wanted(read: Manifest) -> list[str]:
        raise CheckpointError("its progress lacks samples")

    text, said = _refused(folders, {"a": Parameter((4,), STATES, "a")}, wanted)
    assert text.splitlines()[1:] == [f"  {folder}/manifest.json: its progress lacks samples" for folder in folders]
    assert len(said) == 2


def test_state_that_is_not_there_is_told(tmp_path: Path) -> None:
    shapes = {f"p{i}": (3,) for i in range(10)}
    folder = write(tmp_path, 3, tensors(shapes, states=["weight", "momentum"]))
    parameters = {name: Parameter(shape, ("weight", "exp_avg"), name) for name, shape in shapes.items()}
    assert _refused([folder], parameters)[0].splitlines() == [
        f"{folder}: of another optimizer:",
        *(f"  p{i}: exp_avg is not in the checkpoint" for i in range(8)),
        "  and 2 more",
    ]


def test_each_that_cannot_be_read_is_told_and_how_much_more_is_wrong(tmp_path: Path) -> None:
    folders = [write(tmp_path, step, tensors({"a": (40,)}), cuts=[8, 16, 24, 32]) for step in (4, 2)]
    for folder in folders:
        for path in folder.glob("rank-*"):
            path.write_bytes(b"x")
    text, said = _refused(folders, {"a": Parameter((40,), STATES, "a")})
    assert len(text.splitlines()) == 1 + 2 * 5
    assert "no checkpoint is what was written" in text
    assert [line.startswith(f"resume: passed over {folder}: ") for line, folder in zip(said, folders, strict=True)] == [
        True, True
    ]  # fmt: skip
    assert all(line.count("its content differs") == 3 and line.endswith("; and 2 more") for line in said)


PIECES, ROUND_S, LIMIT_S = 50, 0.1, 4.0
"""Of a file, each of which takes a slow disk as long as there is between two rounds; and how long a wait may last."""


class _Half:
    """A strategy with one of two halves of the only parameter."""

    def __init__(self, rank: int, numel: int) -> None:
        half = numel // 2
        self.views = {state: torch.zeros(half) for state in STATES}
        self._shard = Shard("a", (numel,), rank * half, self.views)

    def restore(self, counters: Mapping[str, float]) -> None: ...

    def refresh(self) -> None: ...

    def shards(self) -> Iterator[Shard]:
        yield self._shard


def _read_slowly(folder: Path, numel: int, mark: Callable[[], None], pieces: list[int]) -> dict[str, torch.Tensor]:
    """On two ranks, of which the first proves the only file, from a slow disk."""
    import dtrain.comm
    from dtrain.checkpoint import restore as module
    from dtrain.checkpoint import storage
    from dtrain.plan.world import World

    dtrain.comm.LONG = datetime.timedelta(seconds=LIMIT_S)
    module.ROUND_S, storage.CHUNK_BYTES = ROUND_S, (folder / file_name(0)).stat().st_size // PIECES
    comm = dtrain.comm.TorchComm(World.from_env("cpu")).sibling()
    if comm.rank == 0:
        real = os.preadv

        def slow(*args: Any) -> int:
            time.sleep(ROUND_S)
            pieces.append(1)
            return real(*args)

        os.preadv = slow
    half: Any = _Half(comm.rank, numel)
    parameters = {"a": Parameter((numel,), STATES, "a")}
    restore([folder], half, parameters, lambda read: [], comm, lambda line: None, mark)
    return half.views


def _to_the_end(folder: Path, numel: int) -> tuple[dict[str, Any], int, int]:
    marks: list[int] = []
    pieces: list[int] = []
    views = _read_slowly(folder, numel, lambda: marks.append(1), pieces)
    return {state: view.numpy() for state, view in views.items()}, len(marks), len(pieces)


def test_a_rank_that_reads_for_longer_than_a_wait_may_last_is_waited_for(tmp_path: Path) -> None:
    """As where the only file of an import is proven by the first of many ranks."""
    of = tensors({"a": (30_000,)})
    folder = write(tmp_path, 3, of)
    ranks = run_ranks(_to_the_end, folder, 30_000)
    assert ranks[0][2] * ROUND_S > LIMIT_S
    for rank, (views, num_marks, _) in enumerate(ranks):
        assert num_marks > 2
        for state, whole in of["a"].items():
            assert torch.equal(torch.from_numpy(views[state]), whole.view(2, -1)[rank])


class _Gone(Exception):
    pass


def _left_alone(folder: Path, numel: int) -> int:
    """How often the first rank reads where the other goes as soon as it has heard of it."""
    import torch.distributed as dist

    pieces: list[int] = []
    last = os.environ["RANK"] == "1"

    def mark() -> None:
        if last:
            raise _Gone

    with pytest.raises(_Gone if last else RuntimeError):
        _read_slowly(folder, numel, mark, pieces)
    dist.destroy_process_group()
    return len(pieces)


def test_a_rank_that_is_gone_is_noticed_while_another_reads(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, tensors({"a": (30_000,)}))
    assert 0 < run_ranks(_left_alone, folder, 30_000)[0] < PIECES
