"""Every cell of the table in docs/tuning.md: what it calls supported trains on 2 ranks as on one, goes on under another
strategy from what it saved, and is exported as a folder that transformers and peft load.

Which cells there are is asked of the specs, so that a new tuning is tested by being in the table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dtrain.checkpoint.manifest import folder_name
from dtrain.data.store import RowStore
from dtrain.engine.state import Progress
from tests.contract.small import Recipe, Record, _mean_loss, make_built, overrides
from tests.contract.test_equivalence import difference
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks
from tests.unit.tuning.table import STRATEGIES, TUNINGS, supported

RECIPE = Recipe(7)
HALF = 5
FURTHER = {
    "freeze": ("tuning.last_layers=1",),
    "adalora": ("tuning.rank=3", "tuning.target_rank=2"),
    "ia3": ("optim.lr=0.3",),
    "prompt": ("tuning.num_virtual_tokens=3",),
    "ptuning": ("tuning.num_virtual_tokens=3",),
    "prefix": ("tuning.num_virtual_tokens=3",),
}
WHOLE = os.environ.get("DTRAIN_MATRIX") == "whole"
"""Every cell; else one of each tuning, such that together they are all strategies, to go on under as well."""


class Cell(NamedTuple):
    losses: list[float]
    norms: list[float]
    eval_loss: float
    weights: dict[str, np.ndarray]
    """Of what is trained, whole."""


def _config(folder: Path, title: str, strategy: str, *, recompute: bool) -> list[str]:
    tuning = TUNINGS[title] or [f"tuning={title}"]
    return overrides(folder, RECIPE, *tuning, *FURTHER.get(title, ()), f"strategy={strategy}", "export.dtype=fp32",
                     *(DIVIDED if strategy == "zero3" else ()), f"checkpoint.every_steps={HALF}",
                     f"train.activation_checkpointing={str(recompute).lower()}",
                     "checkpoint.at_end=false")  # fmt: skip


def run_and_save(folder: Path, config: list[str], root: Path, start: Path | None) -> Cell:
    """Call it on every rank: trains, from the checkpoint `start` on, saves as is typed, and exports into `root`."""
    from dtrain.checkpoint.saver import Saver
    from dtrain.engine.engine import Saving

    built, record = make_built(folder, config, resume=[] if start is None else [start]), Record()
    policy = built.config.checkpoint
    root.parent.mkdir(parents=True, exist_ok=True)
    saver = Saver(root, policy, built.comm.sibling())
    saving = Saving(saver, built.describe({}, {"size": built.comm.size}), policy.every_steps, policy.at_end, True)
    built.engine.run([record], Progress(), saving)
    built.export(root / "export")
    weights = {name: full.numpy().copy() for name, full in built.strategy.full_state(set(built.parameters))}
    return Cell([r.loss for r in record.reports], [r.grad_norm for r in record.reports], record.evals[-1].loss, weights)


def _row(folder: Path, title: str, ways: list[tuple[str, str]], root: Path) -> dict[str, tuple[Cell, Cell | None]]:
    """Call it on every rank. `ways`: a strategy, and one to go on under; the same group of ranks serves them all."""
    found: dict[str, tuple[Cell, Cell | None]] = {}
    for strategy, other in ways:
        to = root / strategy
        divided = strategy in ("zero3", "fsdp2")
        whole = run_and_save(folder, _config(folder, title, strategy, recompute=divided), to, None)
        rest = None
        if other:
            # Without: what is not computed again has to have the weights of its forward in the backward pass.
            typed = _config(folder, title, other, recompute=False)
            rest = run_and_save(folder, typed, root / f"{strategy}-{other}", to / folder_name(HALF))
        found[strategy] = (whole, rest)
    return found


# Of `full` the tests of equivalence, of resuming and of exports have every strategy as it is.
@pytest.mark.parametrize("title", TUNINGS if WHOLE else [title for title in TUNINGS if title != "full"])
def test_the_cells_of_a_tuning(small: Path, tmp_path: Path, title: str) -> None:
    if title == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    names = [name for name in STRATEGIES if "fp32" in supported(title, name)]
    assert names
    ways = list(zip(names, names[1:] + names[:1], strict=True))
    if not WHOLE:
        ways = [ways[list(TUNINGS).index(title) * 2 % len(ways)]]
    one = run_ranks(_row, small, title, [("ddp", "")], tmp_path / "one", size=1)[0]["ddp"][0]
    two = run_ranks(_row, small, title, ways, tmp_path / "two", size=2)[0]
    for strategy, (whole, rest) in two.items():
        assert whole.losses == pytest.approx(one.losses, rel=1e-5), strategy
        assert whole.norms == pytest.approx(one.norms, rel=1e-5), strategy
        assert whole.eval_loss == pytest.approx(one.eval_loss, rel=1e-5), strategy
        assert set(whole.weights) == set(one.weights)
        for name, weight in one.weights.items():
            assert difference(whole.weights[name], weight) < 1e-5, (strategy, name)
        assert rest is not None
        assert rest.losses == pytest.approx(whole.losses[HALF:], rel=1e-5), strategy
        for name, weight in whole.weights.items():
            assert difference(rest.weights[name], weight) < 1e-5, (strategy, name)
        loaded = _eval_loss(small, tmp_path / "two" / strategy / "export", title)
        assert loaded == pytest.approx(whole.eval_loss, rel=1e-5), strategy


def _eval_loss(folder: Path, export: Path, title: str) -> float:
    """What transformers, and peft for an adapter, make of the export, each document by itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = (export / "adapter_config.json").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model" if adapter else export, dtype=torch.float32)
    if title == "qlora":
        _round(model)
    if adapter:
        assert json.loads((export / "adapter_config.json").read_text())["peft_type"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = PeftModel.from_pretrained(model, export)
    held_out = RowStore(folder / "eval.arrow")
    with torch.no_grad():
        return float(_mean_loss(model.eval(), [held_out.row(i) for i in range(len(held_out))]))


def _round(model: Any) -> None:
    from bitsandbytes import functional

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                packed, state = functional.quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.copy_(functional.dequantize_4bit(packed, state))
