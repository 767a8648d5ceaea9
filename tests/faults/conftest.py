from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.runs import RunDir
from tests.e2e.command import write_texts
from tests.faults.harness import launch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are made, over the same texts."""
    path = tmp_path_factory.mktemp("faults")
    write_texts(path / "texts.jsonl", 120)
    return path


@pytest.fixture(scope="session")
def whole(folder: Path) -> Callable[..., RunDir]:
    """A run of so many steps to which nothing happened."""
    made: dict[int, RunDir] = {}

    def make(steps: int) -> RunDir:
        if steps not in made:
            ended = launch(folder, f"whole-{steps}", f"train.steps={steps}", "checkpoint.every_steps=0")
            assert ended.code == 0, ended.said
            made[steps] = RunDir(folder / "runs" / f"whole-{steps}")
        return made[steps]

    return make
