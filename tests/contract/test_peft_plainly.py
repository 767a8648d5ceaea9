"""What dtrain makes of peft's methods that are more than layers is what peft makes of them in one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.contract.small import Recipe, _mean_loss, overrides, reference, settled
from tests.contract.test_equivalence import difference
from tests.contract.test_tuning import tune
from tests.processes import run_ranks

RECIPE = Recipe(7)
PLACES = 3
PROMPTS = {
    "prompt": ("tuning=prompt",),
    "prompt, drawn": ("tuning=prompt", "tuning.init=normal"),
    "ptuning": ("tuning=ptuning", "tuning.encoder_hidden=20"),
    "prefix": ("tuning=prefix",),
    "prefix, projected": ("tuning=prefix", "tuning.projection=true", "tuning.encoder_hidden=24"),
}


def _bundle(folder: Path, typed: list[str]) -> Any:
    config = settled(typed)
    return config.tuning.apply(config.model.build(folder / "model", seed=config.run.seed), seed=config.run.seed)


def _copy(into: torch.nn.Module, bundle: Any, name_of: Any) -> None:
    mine = dict(bundle.module.named_parameters())
    with torch.no_grad():
        for name, param in into.named_parameters():
            if param.requires_grad:
                ours = name_of(name)
                assert mine[ours].requires_grad
                param.copy_(bundle.weights.read(ours, 0, param.numel()).view(param.shape))


@pytest.mark.parametrize("way", PROMPTS)
def test_what_comes_before_documents_is_what_peft_puts_there(small: Path, way: str) -> None:
    # Packed rows of up to three documents, on two ranks, against each document by itself.
    typed = overrides(small, RECIPE, *PROMPTS[way], f"tuning.num_virtual_tokens={PLACES}", "strategy=ddp")

    def prepare(model: Any) -> Any:
        from peft import get_peft_config, get_peft_model

        bundle = _bundle(small, typed)
        tuned = get_peft_model(model, get_peft_config(dict(bundle.adapter.config) | {"inference_mode": False}))
        _copy(tuned, bundle, lambda name: name.replace(".default", ""))
        return tuned

    plainly = reference(small, RECIPE, prepare=prepare)
    for ran in run_ranks(tune, small, typed, size=2):
        assert ran.losses == pytest.approx(plainly.losses, rel=1e-5)
        assert ran.norms == pytest.approx(plainly.norms, rel=1e-5)
        for name in ran.trained:
            theirs = plainly.weights[name.replace("prompt_encoder", "prompt_encoder.default")]
            assert difference(ran.weights[name], theirs) < 1e-5, name


ADALORA = ("tuning=adalora", "tuning.rank=4", "tuning.target_rank=2", "tuning.every_steps=2")


def _tune_adalora(folder: Path, typed: list[str]) -> Any:
    """Call it on every rank."""
    from dtrain.engine.state import Progress
    from tests.contract.small import Record, make_built

    built, record = make_built(folder, typed), Record()
    built.engine.run([record], Progress())
    weights = {name: full.numpy().copy() for name, full in built.strategy.full_state(set(built.parameters))}
    return [(r.loss, r.extras["orthogonality"]) for r in record.reports], [r.grad_norm for r in record.reports], weights


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_ranks_are_taken_where_peft_takes_them(small: Path, strategy: str) -> None:
    # Of 14 layers with 4 each, half are left; nothing is taken in step 1, the last choice is made after step 7.
    typed = overrides(small, RECIPE, *ADALORA, f"strategy={strategy}", "train.activation_checkpointing=true")
    tuned: list[Any] = []
    zeros: list[int] = []

    def prepare(model: Any) -> Any:
        from peft import AdaLoraConfig, get_peft_model

        bundle = _bundle(small, typed)
        said = bundle.adapter.config
        tuned.append(get_peft_model(model, AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=said["lora_alpha"], target_modules=said["target_modules"], total_step=10,
            tinit=1, tfinal=3, deltaT=2, task_type="CAUSAL_LM")))  # fmt: skip
        _copy(tuned[0].base_model.model, bundle, lambda name: name)
        return tuned[0].base_model.model

    def mean_loss(model: Any, rows: Any) -> torch.Tensor:
        sides = [
            p if "lora_A" in name else p.T
            for name, p in model.named_parameters()
            if ".lora_A" in name or ".lora_B" in name
        ]
        apart = sum(torch.linalg.matrix_norm(side @ side.T - torch.eye(4)) for side in sides) / len(sides)
        return _mean_loss(model, rows) + 0.5 * apart

    def updated(done: int) -> None:
        tuned[0].base_model.update_and_allocate(done)
        values = [p for name, p in tuned[0].named_parameters() if "lora_E" in name]
        zeros.append(int(sum((value == 0).sum() for value in values)))

    plainly = reference(small, RECIPE, prepare=prepare, mean_loss=mean_loss, updated=updated)
    assert zeros[0] == 0
    assert 0 < zeros[1] < 28
    assert zeros[-4:] == [28] * 4
    for losses, norms, weights in run_ranks(_tune_adalora, small, typed, size=2):
        assert [sum(both) for both in losses] == pytest.approx(plainly.losses, rel=1e-5)
        assert norms == pytest.approx(plainly.norms, rel=1e-5)
        for name, weight in weights.items():
            assert difference(weight, plainly.weights[name]) < 1e-5, name
            if ".lora_E." in name:
                np.testing.assert_array_equal(weight == 0, plainly.weights[name] == 0, err_msg=name)
