"""Tuned models: what one strategy saves another goes on from, with nothing in it but what is trained."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.safetensors import read_header
from tests.contract.saved import run, whole
from tests.contract.small import Recipe, overrides, settled
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks

RECIPE = Recipe(7, steps=8)
HALF = 4
TUNINGS = {
    "lora": ("tuning=lora", "tuning.rank=3", "tuning.dropout=0"),
    "freeze": ("tuning=freeze", "tuning.last_layers=1"),
    "pissa": ("tuning=lora", "tuning.rank=2", "tuning.init=pissa"),
}
PAIRS = [("lora", ("zero3", 2), ("fsdp2", 1)), ("freeze", ("fsdp2", 2), ("ddp", 1)), ("pissa", ("zero1", 2), ("zero3", 2))]  # fmt: skip
"""Whose tensors are compared to the last bit; `test_cells` goes on with every tuning."""


@pytest.mark.parametrize(("tuning", "source", "target"), PAIRS, ids=str)
def test_what_one_saves_another_goes_on_from(
    small: Path, tmp_path: Path, tuning: str, source: tuple[str, int], target: tuple[str, int]
) -> None:
    def go(way: tuple[str, int], root: Path, start: Path | None) -> list[object]:
        typed = overrides(small, RECIPE, f"checkpoint.every_steps={HALF}", "checkpoint.at_end=false", *TUNINGS[tuning],
                          f"strategy={way[0]}", *(DIVIDED if way[0] == "zero3" else ()))  # fmt: skip
        return run_ranks(functools.partial(run, noise=False), small, settled(typed), root, start, size=way[1])

    before = go(source, tmp_path / "a", None)
    folder = tmp_path / "a" / folder_name(HALF)
    after = go(target, tmp_path / "b", folder)
    loaded, saved = whole(ran.first for ran in after), whole(ran.saved for ran in before)
    assert {name for tensors in saved.values() for name in tensors} == set(manifest.read(folder).parameters)
    for state, tensors in saved.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(loaded[state][name], tensor, err_msg=f"{state} of {name}")
    assert after[0].losses == pytest.approx(before[0].losses[HALF:], rel=1e-5)
    assert after[0].norms == pytest.approx(before[0].norms[HALF:], rel=1e-5)
    read = manifest.read(folder)
    assert read.base is not None
    stored = [entry for file in read.files for entry, _ in read_header(folder / file).values() if entry.dtype == "F32"]
    assert sum(e.num_bytes for e in stored) == 12 * sum(math.prod(one.shape) for one in read.parameters.values())
