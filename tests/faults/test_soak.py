"""What `make soak` does for as long as it is given, once, and where nothing is to happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import rows as read
from tests.faults import soak

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "STEPS", 12)
    monkeypatch.setattr(soak, "TYPED", [*soak.TYPED, "train.steps=12"])
    monkeypatch.setattr(soak, "ACCIDENTS", {"none": soak.ACCIDENTS["none"]})


@pytest.mark.usefixtures("short")
def test_a_life_without_accidents_ends_as_the_whole_run_and_what_differs_is_found(tmp_path: Path) -> None:
    lived = soak.Soak(tmp_path, seed=0)
    assert lived.live(1) == 1
    assert lived.wrong == []
    loss = read(lived._run("life-1").metrics)[6]["loss"]
    lived._steps[7]["loss"] = 2 * loss
    lived._rows[16].reverse()
    assert lived._result(lived._run("life-1"), done=True) == [
        f"step 7: loss {loss}, not {2 * loss}",
        "attempt 0: other rows after 16 samples",
    ]
