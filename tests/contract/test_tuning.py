"""Tunings: under every strategy the same as one plain process, and what is not trained stays as it was to the last bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dtrain.engine.state import Progress
from tests.contract.small import Recipe, Record, make_built, overrides, reference
from tests.contract.test_equivalence import STRATEGIES, difference
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks

FREEZE = ("tuning=freeze", "tuning.last_layers=1", "tuning.norms=true", "tuning.patterns=['*layers.0.*q_proj*']")


CELLS = pytest.mark.parametrize(("strategy", "size"), [("ddp", 1), *((name, 2) for name in STRATEGIES)])


class Tuned(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    """Of every parameter, whole."""
    trained: dict[str, tuple[int, ...]]


def typed(folder: Path, recipe: Recipe, strategy: str, *more: str) -> list[str]:
    return overrides(folder, recipe, f"strategy={strategy}", *(DIVIDED if strategy == "zero3" else ()), *more)


def tune(folder: Path, config: list[str]) -> Tuned:
    """Call it on every rank."""
    built, record = make_built(folder, config), Record()
    built.engine.run([record], Progress())
    weights = {name: full.numpy() for name, full in built.strategy.full_state()}
    return Tuned([r.loss for r in record.reports], [r.grad_norm for r in record.reports], weights,
                 {name: one.shape for name, one in built.parameters.items()})  # fmt: skip


def _files(folder: Path) -> dict[str, np.ndarray]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return {name: param.detach().numpy() for name, param in model.named_parameters()}


@pytest.fixture(scope="module")
def frozen_plainly(small: Path) -> Any:
    def freeze(model: Any) -> None:
        for name, param in model.named_parameters():
            param.requires_grad_("layers.1." in name or "norm" in name or ("layers.0." in name and "q_proj" in name))

    return reference(small, Recipe(7), prepare=freeze)


@CELLS
def test_frozen_parts_stay_and_the_rest_is_as_in_one_plain_process(
    small: Path, frozen_plainly: Any, strategy: str, size: int
) -> None:
    before = _files(small)
    for ran in run_ranks(tune, small, typed(small, Recipe(7), strategy, *FREEZE), size=size):
        assert ran.losses == pytest.approx(frozen_plainly.losses, rel=1e-5)
        assert ran.norms == pytest.approx(frozen_plainly.norms, rel=1e-5)
        assert set(ran.trained) == set(frozen_plainly.moments["exp_avg"])
        for name, weight in ran.weights.items():
            if name in ran.trained:
                assert difference(weight, frozen_plainly.weights[name]) < 1e-5, name
                assert (weight != before[name]).any(), name
            else:
                np.testing.assert_array_equal(weight, before[name], err_msg=name)


def _frozen(folder: Path, each: dict[str, list[str]]) -> dict[str, dict[str, Sequence[Any]]]:
    """Call it on every rank: one after another, by one group of ranks."""
    found = {}
    for strategy, config in each.items():
        shards = make_built(folder, config).strategy.frozen_shards()
        found[strategy] = {one.name: (one.start, one.views["weight"].dtype, one.views["weight"].float().numpy().copy())
                           for one in shards}  # fmt: skip
    return found


def test_in_bf16_what_is_frozen_is_kept_once_and_in_bf16(small: Path) -> None:
    before = _files(small)
    bf16 = {name: typed(small, Recipe(7), name, *FREEZE, "train.precision=bf16") for name in STRATEGIES}
    for ran in run_ranks(_frozen, small, bf16, size=2):
        for strategy, shards in ran.items():
            assert shards, strategy
            for name, (start, dtype, values) in shards.items():
                assert dtype == torch.bfloat16, (strategy, name)
                expected = torch.from_numpy(before[name]).flatten()[start : start + len(values)].bfloat16().float()
                np.testing.assert_array_equal(values, expected.numpy(), err_msg=f"{strategy}: {name}")


LORA = ("tuning=lora", "tuning.rank=3", "tuning.alpha=12")


def _same_start(folder: Path, *, copy_base: bool = True) -> Callable[[Any], Any]:
    """A PEFT model of peft's own with the values that dtrain starts from."""

    def prepare(model: Any) -> Any:
        import torch.distributed as dist
        from peft import LoraConfig, get_peft_model

        from tests.contract.small import settled

        config = settled(overrides(folder, Recipe(7), *LORA))
        bundle = config.tuning.apply(config.model.build(folder / "model", seed=config.run.seed), seed=config.run.seed)
        assert not dist.is_initialized()
        said = dict(bundle.adapter.config) | {"inference_mode": False}
        tuned = get_peft_model(model, LoraConfig(**{k: v for k, v in said.items() if k in _KEYS}))
        mine = {name: bundle.weights.read(name, 0, param.numel()).view(param.shape)
                for name, param in bundle.module.named_parameters()}  # fmt: skip
        with torch.no_grad():
            for name, param in tuned.base_model.model.named_parameters():
                if copy_base or "lora_" in name:
                    param.copy_(mine[name])
        return tuned.base_model.model

    return prepare


def _in_4_bits(folder: Path) -> Callable[[Any], Any]:
    """The same with the linear layers of the blocks rounded to what 4 bits can say, by bitsandbytes' own layer."""

    def prepare(model: Any) -> Any:
        from bitsandbytes import functional

        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and ".layers." in name:
                    packed, state = functional.quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                    module.weight.copy_(functional.dequantize_4bit(packed, state))
        return _same_start(folder, copy_base=False)(model)

    return prepare


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_is_lora_on_a_model_in_4_bits(small: Path, tmp_path: Path) -> None:
    recipe, options = Recipe(7), ["tuning=qlora", *LORA[1:], "export.dtype=fp32"]
    plainly = reference(small, recipe, prepare=_in_4_bits(small))
    for strategy, size in (("ddp", 1), ("zero2", 2), ("fsdp2", 2)):
        to = tmp_path / strategy
        ran = run_ranks(exported, small, typed(small, recipe, strategy, *options), to, size=size)[0]
        assert ran.losses == pytest.approx(plainly.losses, rel=1e-5)
        assert set(ran.trained) == set(plainly.moments["exp_avg"])
        for name in ran.trained:
            assert difference(ran.weights[name], plainly.weights[name]) < 1e-5, name
    merged = torch.load(to / "merged.pt", weights_only=True)
    name = "model.layers.0.mlp.up_proj"
    delta = 4 * plainly.weights[f"{name}.lora_B.default.weight"] @ plainly.weights[f"{name}.lora_A.default.weight"]
    expected = plainly.weights[f"{name}.base_layer.weight"] + delta
    assert difference(merged[f"{name}.weight"].numpy(), expected) < 1e-5


_KEYS = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias", "task_type"}


@pytest.fixture(scope="module")
def lora_plainly(small: Path) -> Any:
    return reference(small, Recipe(7), prepare=_same_start(small))


@CELLS
def test_lora_is_what_peft_makes_of_it_in_one_plain_process(
    small: Path, lora_plainly: Any, strategy: str, size: int
) -> None:
    before = _files(small)
    more = ["train.activation_checkpointing=true"] if strategy in ("zero3", "fsdp2") else []
    for ran in run_ranks(tune, small, typed(small, Recipe(7), strategy, *LORA, *more), size=size):
        assert ran.losses == pytest.approx(lora_plainly.losses, rel=1e-5)
        assert ran.norms == pytest.approx(lora_plainly.norms, rel=1e-5)
        assert set(ran.trained) == set(lora_plainly.moments["exp_avg"])
        assert len(ran.trained) == 2 * 7 * 2
        for name, weight in ran.weights.items():
            if name in ran.trained:
                assert difference(weight, lora_plainly.weights[name]) < 1e-5, name
            else:
                np.testing.assert_array_equal(weight, before[name.replace(".base_layer", "")], err_msg=name)


def _tune_each(folder: Path, each: dict[str, list[str]]) -> dict[str, Tuned]:
    """Call it on every rank: one after another, by one group of ranks."""
    return {name: tune(folder, config) for name, config in each.items()}


def test_lora_in_bf16_means_the_same_in_every_strategy(small: Path, lora_plainly: Any) -> None:
    # The bounds of `test_bf16_means_the_same_in_every_strategy`: of losses 2^-8, of norms ten times that.
    bf16 = {name: typed(small, Recipe(7), name, *LORA, "train.precision=bf16") for name in STRATEGIES}
    one = run_ranks(_tune_each, small, {"ddp": bf16["ddp"]}, size=1)[0]["ddp"]
    assert one.losses == pytest.approx(lora_plainly.losses, rel=3e-2)
    assert one.losses != pytest.approx(lora_plainly.losses, rel=1e-6), "this was not bf16"
    for ran in run_ranks(_tune_each, small, bf16, size=2):
        for strategy, two in ran.items():
            assert len(two.losses) == 10
            assert two.losses == pytest.approx(one.losses, rel=4e-3), strategy
            assert two.norms == pytest.approx(one.norms, rel=4e-2), strategy


WAYS: dict[str, tuple[str, ...]] = {
    "dora": ("tuning.dora=true",),
    "rslora": ("tuning.rslora=true", "tuning.init=gaussian"),
    "pissa": ("tuning.init=pissa",),
    "olora": ("tuning.init=olora",),
    "ia3": ("tuning=ia3", "optim.lr=0.3"),
    "named": ("tuning.targets=[q_proj,'*.0.mlp.*']", "tuning.modules_to_save=[embed_tokens]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_lora_starts_as_the_model_and_merges_and_loads(small: Path, tmp_path: Path, way: str) -> None:
    # ZeRO-2 on 2 ranks trains as one process with DDP does, and what is exported gives the trained model's logits.
    recipe, kind = Recipe(7, steps=4), () if "tuning=ia3" in WAYS[way] else LORA
    options = [*kind, *WAYS[way], "export.dtype=fp32"]
    strategy = "fsdp2" if way == "dora" else "zero3"
    one = run_ranks(exported, small, typed(small, recipe, "ddp", *options), tmp_path / "one", size=1)[0]
    two = run_ranks(exported, small, typed(small, recipe, strategy, *options), tmp_path / "two", size=2)[0]
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    first = reference(small, Recipe(7, steps=1)).losses[0]
    assert one.losses[0] == pytest.approx(first, rel=1e-5)
    assert_loads(small, tmp_path / "two", two.weights)


def exported(folder: Path, config: list[str], to: Path) -> Tuned:
    """Call it on every rank: trains, exports the adapter, and the model with it merged beside it."""
    built, record = make_built(folder, config), Record()
    built.engine.run([record], Progress())
    built.export(to)
    weights = {name: full.clone() for name, full in built.strategy.full_state()}
    if built.comm.rank == 0:
        merged = dict(built.bundle.adapter.merged(lambda name: weights[name]))
        torch.save(merged, to / "merged.pt")
    return Tuned([r.loss for r in record.reports], [], {name: one.numpy() for name, one in weights.items()},
                 {name: one.shape for name, one in built.parameters.items()})  # fmt: skip


def assert_loads(folder: Path, adapter: Path, weights: dict[str, np.ndarray]) -> None:
    """peft loads what was exported, nothing is missing, and its logits are those of the merged model."""
    import warnings

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.arange(1, 23)[None]
    plain = base(input_ids=ids).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tuned = PeftModel.from_pretrained(base, adapter)
    got = tuned(input_ids=ids).logits.detach()
    assert float((got - plain).abs().max()) > 1e-2, "it has learned something"
    again = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    merged = torch.load(adapter / "merged.pt", weights_only=True)
    missing, unexpected = again.load_state_dict(merged, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    torch.testing.assert_close(again(input_ids=ids).logits, got, rtol=1e-4, atol=1e-5)
