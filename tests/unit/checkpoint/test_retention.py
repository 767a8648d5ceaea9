from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.retention import best, due, point, pointers, prune, superfluous, useless, whole
from dtrain.config.schema import Checkpoint
from tests.unit.checkpoint.synthetic import tensors, write

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: 4.0}
STEPS = {step: {"loss": loss} for step, loss in LOSSES.items()}


@pytest.mark.parametrize(("said", "gone"), [
    ({"keep_last": 2}, [10, 20, 30]),
    ({"keep_last": 9}, []),
    ({"keep_last": 1, "keep_every": 20}, [10, 30]),
    ({"keep_last": 1, "best_by": "loss"}, [10, 30, 40]),  # of two equals the earlier
    ({"keep_last": 1, "best_by": "loss", "best_mode": "max"}, [10, 20, 30, 40]),
    ({"keep_last": 1, "best_by": "eval_loss"}, [10, 20, 30, 40]),  # nowhere measured
])  # fmt: skip
def test_what_need_not_stay(said: dict, gone: list[int]) -> None:
    assert superfluous(STEPS, Checkpoint(**said)) == gone


def test_what_is_pinned_stays() -> None:
    assert superfluous(STEPS, Checkpoint(keep_last=1), pinned=[10, 30, 77]) == [20, 40]


def test_the_best_of_what_is_a_number() -> None:
    policy = Checkpoint(best_by="loss")
    assert best({1: {"loss": float("nan")}, 2: {"loss": 5.0}, 3: {"loss": None}, 4: {}}, policy) == 2
    assert best({1: {"loss": float("nan")}}, policy) is None
    assert best({}, policy) is None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step, loss in LOSSES.items():
        write(tmp_path, step, tensors({"w": (3,)}), metrics={"loss": loss})
    return tmp_path


def _left(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_prune(root: Path) -> None:
    removed = prune(root, Checkpoint(keep_last=2, best_by="loss"))
    assert [path.name for path in removed] == [folder_name(10), folder_name(30)]
    assert _left(root) == [20, 40, 50]
    assert pointers(root) == {"best": folder_name(20), "latest": folder_name(50)}
    assert sorted(path.name for path in root.iterdir()) == ["best", "latest", *(folder_name(n) for n in (20, 40, 50))]


def test_what_a_person_points_to_stays(root: Path) -> None:
    (root / "paper").write_text(f"{folder_name(10)}\n")
    prune(root, Checkpoint(keep_last=1))
    assert _left(root) == [10, 50]
    (root / "paper").unlink()
    prune(root, Checkpoint(keep_last=1))
    assert _left(root) == [50]


def test_later_steps_that_were_passed_over_do_not_count(root: Path) -> None:
    """A run that went on from 20, for 30 to 50 were damaged inside, has saved 30 anew."""
    prune(root, Checkpoint(keep_last=1), newest=30)
    assert _left(root) == [30, 40, 50]
    assert pointers(root)["latest"] == folder_name(30)


def test_what_is_damaged_does_not_count(root: Path) -> None:
    """Nor is it removed while it may be worth a repair: until there are as many later ones as are to stay."""
    (root / folder_name(50) / "rank-00000.safetensors").write_bytes(b"short")
    manifest = root / folder_name(10) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 60}))
    assert sorted(whole(root)) == [20, 30, 40]
    prune(root, Checkpoint(keep_last=1))
    assert _left(root) == [40, 50]
    assert pointers(root)["latest"] == folder_name(40)


def test_what_is_damaged_stays_where_it_is_asked_for(root: Path) -> None:
    for step in (10, 20, 30):
        (root / folder_name(step) / "rank-00000.safetensors").write_bytes(b"short")
    (root / "paper").write_text(f"{folder_name(10)}\n")
    assert useless(root, whole(root), Checkpoint(keep_last=3)) == []
    prune(root, Checkpoint(keep_last=2, keep_every=20))
    assert _left(root) == [10, 20, 40, 50]


def test_the_best_outlives_a_moment_in_which_it_cannot_be_seen(root: Path) -> None:
    policy = Checkpoint(keep_last=1, best_by="loss")
    prune(root, policy)
    assert pointers(root)["best"] == folder_name(20)
    hidden = (root / folder_name(20) / "rank-00000.safetensors").rename(root.parent / "hidden")
    write(root, 60, tensors({"w": (3,)}), metrics={"loss": 9.0})
    prune(root, policy)
    hidden.rename(root / folder_name(20) / "rank-00000.safetensors")
    prune(root, policy)
    assert pointers(root)["best"] == folder_name(20)


def test_due_removes_nothing(root: Path) -> None:
    point(root, "latest", 30)
    assert due(root, whole(root), Checkpoint(keep_last=1)) == [root / folder_name(n) for n in (10, 20, 40)]
    assert _left(root) == sorted(LOSSES)


def test_nothing_to_prune(tmp_path: Path) -> None:
    assert prune(tmp_path, Checkpoint()) == []
    assert list(tmp_path.iterdir()) == []
    assert pointers(tmp_path / "none") == {}
