"""What `dtrain plan` shows, whole. `UPDATE_GOLDEN=1 pytest tests/golden` writes it anew; read the difference before you commit it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.cli import run
from dtrain.config.compose import choices
from dtrain.plan.machine import Machine

HERE = Path(__file__).parent / "plan"
QWEN = [
    "model=qwen7b",
    "device=cuda",
    "launcher.procs=8",
    "device_memory_gb=80",
    "batch.global_batch=64",
    "dataset.max_length=2048",
]
CASES = {
    "default": [],
    "smoke": ["experiment=smoke"],
    "qwen7b": QWEN,
    **{f"qwen7b-{name}": [*QWEN, f"strategy={name}"] for name in choices()["strategy"] if name != "auto"},
    "qwen7b-recomputed": [*QWEN, "train.activation_checkpointing=true", "train.epochs=3", "tracker=[]", "eval.fraction=0"],
    "qwen7b-offload": [*QWEN, "strategy=zero3", "strategy.offload_optimizer=cpu"],
    "qwen7b-hsdp": [*QWEN, "strategy=fsdp2", "strategy.replicas=2"],
    "uneven": ["batch.global_batch=10", "launcher.procs=4", "strategy=zero2"],
    "many-ranks": ["batch.global_batch=1030", "launcher.procs=256", "device=cuda", "schedule=wsd", "schedule.warmup_steps=200"],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_plan(name: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dtrain.plan.propose.look", lambda: Machine(4, 32 * 2**30, 0, "", 0))
    assert run(["plan", *CASES[name]]) == 0
    shown, path = capsys.readouterr().out, HERE / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == shown


def test_no_snapshot_without_a_case() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_it_fits_a_screen(name: str) -> None:
    lines = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 30
    assert max(map(len, lines)) <= 160
