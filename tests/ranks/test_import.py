"""What DeepSpeed and torch really wrote, as a checkpoint that a run goes on from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from dtrain.checkpoint import manifest
from dtrain.checkpoint.foreign import open_source, write
from dtrain.checkpoint.storage import Reader
from dtrain.checkpoint.verify import problems
from dtrain.plan.world import World
from tests.contract.small import VOCAB, Recipe, Record, Trained, make, make_built, overrides, reference
from tests.processes import run_ranks

Whole = dict[tuple[str, str], np.ndarray]
"""By parameter and state."""
STATES = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make(folder)
    return folder


def _model(small: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(small / "model", dtype=torch.float32).train()


def _loss(model: Any, rank: int) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(rank))
    return model(input_ids=tokens, labels=tokens).loss


def _deepspeed(small: Path, stage: int, out: Path) -> Whole:
    """Three steps, saved and made universal; what its own functions say of every parameter."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel
    dist.init_process_group("gloo")
    rank = World.from_env("cpu").rank
    model = _model(small)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
              "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
                                      config=config, dist_init_required=False)  # fmt: skip
    for _ in range(3):
        engine.backward(_loss(engine, rank))
        engine.step()
    engine.save_checkpoint(str(out / "native"), tag="t")
    dist.barrier()
    if rank == 0:
        ds_to_universal.main(argparse.Namespace(
            input_folder=str(out / "native" / "t"), output_folder=str(out / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        ))  # fmt: skip
    found: Whole = {}
    for name, param in engine.module.named_parameters():
        found[name, "weight"] = safe_get_full_fp32_param(param).numpy()
        found |= {(name, state): safe_get_full_optimizer_state(param, state).numpy() for state in STATES}
    return found


def _fsdp2(small: Path, _: int, out: Path) -> Whole:
    """Three steps, saved by torch's own functions under the names of its tutorial."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank = World.from_env("cpu").rank
    model = _model(small)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _step in range(3):
        _loss(model, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "epoch": 2}, checkpoint_id=out / "dcp")
    found: Whole = {}
    for name, param in model.named_parameters():
        found[name, "weight"] = param.full_tensor().detach().numpy()
        found |= {(name, one): optimizer.state[param][one].full_tensor().numpy() for one in STATES}
    return found


@pytest.mark.parametrize(("make_source", "stage", "folder"), [
    (_deepspeed, 2, "universal"), (_deepspeed, 3, "universal"), (_fsdp2, 0, "dcp"),
])  # fmt: skip
def test_every_element_arrives(small: Path, tmp_path: Path, make_source: Any, stage: int, folder: str) -> None:
    expected = run_ranks(make_source, small, stage, tmp_path)[0]
    source = open_source(tmp_path / folder)
    assert "lm_head.weight" not in source.shapes, "it is tied to the embedding"
    to = tmp_path / "made"
    made = write(source, to, step=3, samples=24)
    assert problems(to) == []
    assert (made.step, made.counters, made.progress["samples"], made.identity) == (3, {"updates": 3}, 24, {})
    _same(_read(to), expected)


def _read(folder: Path) -> Whole:
    reader = Reader(folder, manifest.read(folder))
    found: Whole = {}
    for name, one in reader.manifest.parameters.items():
        for state in one.states:
            out = torch.empty(one.shape)
            reader.read_into(name, state, 0, out.view(-1))
            found[name, state] = out.numpy()
    reader.close()
    return found


def _same(a: Whole, b: Whole) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.shape == b[key].shape, key
        assert np.array_equal(tensor, b[key]), key


DONE = 4


def test_a_run_goes_on_as_if_it_had_been_its_own(small: Path, tmp_path: Path) -> None:
    """The first steps by torch alone, saved by torch alone."""

    def save(done: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if done == DONE:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"app": {"net": weights, "optim": state}}, checkpoint_id=tmp_path / "dcp", no_dist=True)

    recipe = Recipe(8)
    expected = reference(small, recipe, after=save)
    write(open_source(tmp_path / "dcp"), tmp_path / "made", step=DONE, samples=DONE * recipe.global_batch)
    for got in run_ranks(_go_on, small, recipe, tmp_path / "made", size=2):
        assert got.losses == pytest.approx(expected.losses[DONE:], rel=1e-5)
        assert got.norms == pytest.approx(expected.norms[DONE:], rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        assert got.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            assert np.abs(got.weights[name] - weight).max() / np.abs(weight).max() < 1e-5, name


def _go_on(small: Path, recipe: Recipe, folder: Path) -> Trained:
    from dtrain.engine.state import Progress

    record = Record()
    built = make_built(small, overrides(small, recipe, "strategy=zero2"), resume=[folder])
    built.engine.run([record], Progress())
    weights = {name: full.numpy() for name, full in built.strategy.full_state()}
    return Trained([r.loss for r in record.reports], [r.grad_norm for r in record.reports], weights,
                   record.evals[-1].loss)  # fmt: skip
