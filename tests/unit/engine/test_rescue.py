from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from dtrain.engine import rescue
from dtrain.engine.rescue import Rescue


class Rank:
    """One with a rescue that notes what it does."""

    def __init__(self, folder: Path, recorded: threading.Event) -> None:
        self.kept: list[int] = []
        self.left = threading.Event()
        self.rescue = Rescue(folder / "word.json", recorded.is_set, self.left.set)

    def begin(self, step: int) -> None:
        self.rescue.begin(step, lambda: self.kept.append(step))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    monkeypatch.setattr(rescue, "LOOK_S", 0.02)
    return threading.Event()


def test_the_others_save_the_same_step_and_leave_once_the_failure_is_recorded(
    tmp_path: Path, recorded: threading.Event
) -> None:
    failed, late = Rank(tmp_path, recorded), Rank(tmp_path, recorded)
    failed.begin(4)
    late.begin(3)
    failed.rescue.failed(MemoryError())
    assert failed.kept == [4]
    assert not late.left.wait(0.2)
    assert late.kept == []  # it has not come to that step
    late.begin(4)
    deadline = time.monotonic() + 60
    while not late.kept and time.monotonic() < deadline:
        time.sleep(0.01)
    assert late.kept == [4]
    assert not late.left.wait(0.2)
    recorded.set()
    assert late.left.wait(60)
    late.rescue.failed(RuntimeError("Connection closed by peer"))
    assert late.kept == [4]
    assert not failed.left.is_set()


def test_what_is_no_lack_of_memory_or_comes_within_the_update_is_no_matter_of_it(
    tmp_path: Path, recorded: threading.Event
) -> None:
    rank, other = Rank(tmp_path, recorded), Rank(tmp_path, recorded)
    rank.begin(4)
    rank.rescue.failed(ValueError("row 7 is a banana"))
    rank.rescue.updating()
    rank.rescue.failed(MemoryError())
    assert rank.kept == []
    assert not (tmp_path / "word.json").exists()
    for one in (rank, other):
        one.rescue.end()
        assert not one.left.is_set()
