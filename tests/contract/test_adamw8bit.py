"""Moments in 8 bits: near to those in 32, saved in 32, and gone on with under another strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import folder_name
from tests.contract.small import Recipe, make, overrides
from tests.contract.test_cells import Cell, run_and_save
from tests.processes import run_ranks

pytest.importorskip("bitsandbytes")
HALF = 5


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding has 401 * 32 numbers, more than 4,096 on each of two ranks, which is where 8 bits begin; no whole
    number of blocks of 256 on one, and of rows on both.
    """
    folder = tmp_path_factory.mktemp("larger")
    make(folder, vocab=401)
    return folder


def _all(folder: Path, root: Path) -> dict[str, Cell]:
    """Call it on every rank."""

    def go(name: str, *typed: str, start: Path | None = None) -> Cell:
        config = overrides(folder, Recipe(7), *typed, f"checkpoint.every_steps={HALF}", "checkpoint.at_end=false",
                           "export.dtype=fp32")  # fmt: skip
        return run_and_save(folder, config, root / name, start)

    saved = root / "ddp" / folder_name(HALF)
    return {
        "adamw": go("adamw", "strategy=ddp"),
        "ddp": go("ddp", "strategy=ddp", "optim=adamw8bit"),
        "unsaved": go("unsaved", "strategy=ddp", "optim=adamw8bit", "checkpoint.every_steps=0"),
        "again": go("again", "strategy=ddp", "optim=adamw8bit", start=saved),
        "fsdp2": go("fsdp2", "strategy=fsdp2", "optim=adamw8bit", start=saved),
    }


def test_8_bits_are_near_saved_and_gone_on_with(larger: Path, tmp_path: Path) -> None:
    ran = run_ranks(_all, larger, tmp_path, size=2)[0]
    whole = ran["ddp"]
    assert whole.losses == pytest.approx(ran["adamw"].losses, rel=1e-2)
    assert whole.losses != pytest.approx(ran["adamw"].losses, rel=1e-6), "something was rounded"
    assert ran["unsaved"].losses == whole.losses, "a save changes nothing"
    # In the same blocks the same bits come out; in others, of other ranks, they are rounded once more.
    assert ran["again"].losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    assert ran["fsdp2"].losses == pytest.approx(whole.losses[HALF:], rel=1e-2)
    assert set(manifest.read(tmp_path / "ddp" / folder_name(HALF)).parameters["model.embed_tokens.weight"].states) == {
        "weight", "exp_avg", "exp_avg_sq"}  # fmt: skip
