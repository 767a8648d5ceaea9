"""Who proves which file, and what is refused before anything is filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.manifest import File, Parameter
from dtrain.checkpoint.restore import restore, share
from dtrain.checkpoint.storage import file_name
from dtrain.errors import CheckpointError
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


def _refused(folders: list[Path], parameters: dict[str, Parameter]) -> tuple[str, list[str]]:
    said: list[str] = []
    nothing: Any = None  # is asked of the strategy before that
    with pytest.raises(CheckpointError) as raised:
        restore(folders, nothing, parameters, lambda read: [], Solo(), said.append)
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
