"""The dataset, the objective and the strategy of docs/add-a-choice.md, as they stand there, through the real command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, SMALL, dtrain, rows

FILES = ("my_pkg/table.py", "conf/dataset/table.yaml", "my_pkg/completion.py", "conf/objective/completion.yaml",
         "my_pkg/plain.py", "my_pkg/_plain.py", "conf/strategy/plain.yaml")  # fmt: skip
STEPS = 4


@pytest.fixture
def here(tmp_path: Path) -> Path:
    page = (ROOT / "docs" / "add-a-choice.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", page, flags=re.DOTALL)
    for name, text in zip(FILES, blocks, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    lines = [f"What is {i} and {i + 1}? ANSWER: it is {2 * i + 1}" for i in range(120)]
    (tmp_path / "qa.csv").write_text("\n".join(["text", *lines]) + "\n")
    return tmp_path


def launched(here: Path, name: str, *typed: str) -> list[float]:
    """The losses of a run."""
    own = [*SMALL, "dataset=table", "dataset.path=qa.csv", "objective=completion", "plugins=[my_pkg]", "tracker=[jsonl]",
           f"train.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=9", f"run.name={name}"]  # fmt: skip
    done = dtrain(here, "launch", "--config-dir", "conf", *own, *typed, env={"PYTHONPATH": f"{ROOT}:{here}"})
    assert done.returncode == 0, done.stdout + done.stderr
    return [row["loss"] for row in rows(here / "runs" / name / "metrics.jsonl")]


def test_they_train_save_and_go_on_as_the_page_has_them(here: Path) -> None:
    one = launched(here, "one", "strategy=ddp", "launcher.procs=1")
    assert len(one) == STEPS
    assert one[-1] < one[0]
    assert launched(here, "two", "strategy=plain", "launcher.procs=2") == pytest.approx(one, abs=1e-5)
    half = f"resume={here / 'runs' / 'one' / 'checkpoints' / 'step-00000002'}"
    assert launched(here, "rest", "strategy=plain", "launcher.procs=2", half) == pytest.approx(one[2:], abs=1e-5)
