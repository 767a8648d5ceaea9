"""What tunings refuse, what they count, and what a run proves of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cli import run as dtrain
from dtrain.engine.proof import Proof
from dtrain.errors import ModelError
from dtrain.models.base import ModelBundle
from dtrain.models.virtual import widen
from dtrain.plan.propose import configure
from dtrain.strategies.base import Shard
from dtrain.tuning import _adalora
from dtrain.tuning.adalora import AdaLoRA
from tests.contract.small import make
from tests.unit.models.test_attention import Solo, write
from tests.unit.tuning import table

TYPED = ["model=hf", "dataset=stdlib", "train.steps=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make(folder)
    return folder / "model"


def tuned(model: Path, *typed: str) -> tuple[Any, ModelBundle]:
    config, _ = configure([*TYPED, f"model.path={model}", *typed], None)
    bundle = config.tuning.apply(config.model.build(model, seed=0), seed=0)
    return config, bundle


@pytest.mark.parametrize("typed", [
    ["tuning=freeze", "tuning.last_layers=1"],
    ["tuning=freeze", "tuning.last_layers=1", "tuning.norms=true", "tuning.embeddings=true"],
    ["tuning=freeze", "tuning.last_layers=0", "tuning.head=true"],
    ["tuning=lora", "tuning.rank=3"],
    ["tuning=lora", "tuning.rank=3", "tuning.targets=[q_proj,'*.mlp.*']", "tuning.modules_to_save=[embed_tokens]"],
    ["tuning=lora", "tuning.rank=3", "tuning.dora=true"],
    ["tuning=ia3"],
    ["tuning=adalora", "tuning.rank=3", "tuning.target_rank=2", "tuning.targets=[q_proj,'*.mlp.*']"],
    ["tuning=prompt", "tuning.num_virtual_tokens=7"],
    ["tuning=ptuning", "tuning.num_virtual_tokens=7", "tuning.encoder_hidden=12"],
    ["tuning=prefix", "tuning.num_virtual_tokens=7"],
    ["tuning=prefix", "tuning.num_virtual_tokens=7", "tuning.projection=true", "tuning.encoder_hidden=12"],
], ids=lambda typed: " ".join(typed))  # fmt: skip
def test_the_plan_counts_what_the_model_then_has(model: Path, typed: list[str]) -> None:
    config, bundle = tuned(model, *typed)
    figures = config.model.figures()
    params = list(bundle.module.parameters())
    assert config.tuning.num_trainable(figures) == sum(p.numel() for p in params if p.requires_grad)
    if "modules_to_save" not in " ".join(typed):
        assert config.tuning.num_frozen(figures) == sum(p.numel() for p in params if not p.requires_grad)


def test_what_is_added_depends_on_the_seed_and_the_name_alone(model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    values = []
    for order in (1, -1):
        _, bundle = tuned(model, "tuning=lora")
        names = [name for name, p in bundle.module.named_parameters() if p.requires_grad][::order]
        torch.manual_seed(order)
        read = {one: bundle.weights.read(one, 0, bundle.module.get_parameter(one).numel()) for one in names}
        values.append(read)
        piece = bundle.weights.read(name, 7, 11)
        assert torch.equal(piece, read[name][7:18])
    assert all(torch.equal(values[0][one], values[1][one]) for one in values[0])
    assert float(values[0][name].abs().max()) > 0
    assert float(values[0][name.replace("lora_A", "lora_B")].abs().max()) == 0


@pytest.mark.parametrize(("typed", "said"), [
    (["tuning=lora", "tuning.targets=[q_prj]"], ["tuning.targets=q_prj", "matches no linear layer", "q_proj"]),
    (["tuning=lora", "tuning.targets=[attention]"], ["tuning.targets=attention", "there are", "self_attn"]),
    (["tuning=lora", "tuning.modules_to_save=[lm_hed]"], ["tuning.modules_to_save=lm_hed", "lm_head"]),
    (["tuning=freeze", "tuning.patterns=['*q_prj*']"], ["tuning.patterns=*q_prj*", "matches no parameter", "q_proj"]),
    (["tuning=freeze", "tuning.last_layers=9"], ["tuning.last_layers=9", "has 2 layers"]),
    (["tuning=lora", "tuning.init_from=nowhere"], ["tuning.init_from=nowhere", "no adapter"]),
    (["tuning=prompt", "tuning.init_from=nowhere"], ["tuning.init_from=nowhere", "prompt_embeddings"]),
    (["tuning=adalora", "tuning.targets=[q_prj]"], ["tuning.targets=q_prj", "q_proj"]),
])  # fmt: skip
def test_what_the_model_has_not(model: Path, typed: list[str], said: Sequence[str]) -> None:
    with pytest.raises(ModelError) as error:
        tuned(model, *typed)
    assert all(word in str(error.value) for word in said), str(error.value)


@pytest.mark.parametrize(("typed", "said"), [
    (["tuning=lora", "tuning.rank=0"], "tuning.rank"),
    (["tuning=lora", "tuning.r=4"], "tuning.rank"),
    (["tuning=lora", "tuning.targets=[]"], "tuning.targets=[]"),
    (["tuning=lora", "tuning.dora=true", "tuning.init=pissa"], "tuning.init=pissa"),
    (["tuning=lora", "tuning.dora=true", "strategy=zero3"], "tuning.dora=true"),
    (["tuning=qlora", "strategy=zero3"], "tuning=qlora: the 4-bit weights are whole on every rank"),
    (["tuning=qlora", "tuning.init=olora"], "tuning.init=olora"),
    (["tuning=freeze", "tuning.last_layers=0"], "tuning.last_layers=0"),
    (["tuning=ia3", "tuning.inputs=[k_proj]"], "tuning.inputs=k_proj"),
    (["tuning=adalora", "tuning.target_rank=13"], "tuning.target_rank=13: more than tuning.rank=12"),
    (["tuning=adalora", "tuning.warmup=0.5", "tuning.final=0.5"], "tuning.final=0.5: with tuning.warmup=0.5 no steps"),
    (["tuning=adalora", "strategy=zero3", "strategy.offload_optimizer=nvme", "strategy.nvme_path=/tmp"],
     "tuning=adalora: which ranks are taken is read from the optimizer's state, and strategy.offload_optimizer=nvme"),
    (["tuning=adalora", "tuning.tfinal=3"], "tuning.final, a part of all steps"),
    (["tuning=prompt", "tuning.init=text"], "tuning.text is empty"),
    (["tuning=prompt", "tuning.text=hello"], "tuning.text=hello; give both init=text and a text"),
    (["tuning=prompt", "tuning.init=normal", "tuning.init_from=x"], "tuning.init_from=x: the adapter says what is"),
    (["tuning=prefix", "tuning.init=zero", "tuning.init_from=x"], "tuning.init_from=x: the adapter says what is"),
    (["tuning=prompt", "dataset.max_length=60"], "with tuning.num_virtual_tokens=20 before it more than the 64"),
    (["tuning=prefix", "tuning.encoder_hidden=4"], "tuning.encoder_hidden=4: of a network"),
    (["tuning=prefix", "tuning.projection=true", "tuning.init_from=x"], "tuning.init_from=x: a folder has what"),
])  # fmt: skip
def test_refused_before_anything_starts(model: Path, typed: list[str], said: str, capsys: Any) -> None:
    assert dtrain(["plan", *TYPED, f"model.path={model}", "device=cpu", "launcher.procs=2", *typed]) == 2
    assert said in capsys.readouterr().err


def test_bitsandbytes_that_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    typed = [*TYPED, f"model.path={model}", "device=cpu", "launcher.procs=2", "tuning=qlora", "strategy=zero2"]
    assert dtrain(["plan", *typed]) == 2
    assert "bitsandbytes is not installed" in capsys.readouterr().err


class _Comm:
    rank, size = 0, 1

    def max(self, values: list[float]) -> list[float]:
        return values


@dataclasses.dataclass
class _Strategy:
    moments: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]

    def shards(self) -> Iterator[Shard]:
        for name, moment in self.moments.items():
            yield Shard(name, (len(moment),), 0, {"weight": torch.ones_like(moment), "exp_avg": moment})

    def frozen_shards(self) -> Iterator[Shard]:
        for name, value in self.kept.items():
            yield Shard(name, (len(value),), 0, {"weight": value})


def test_what_gets_no_gradient_is_named() -> None:
    strategy: Any = _Strategy({"a": torch.tensor([0.0, 1e-20]), "b": torch.zeros(3), "c": torch.zeros(2)}, {})
    comm: Any = _Comm()
    with pytest.raises(ModelError, match="1 of 3 trained parameters got no gradient in the first step: b"):
        Proof(strategy, comm, ["a", "b", "c"], lambda name: name != "c").moved()
    strategy.moments["b"][1] = math.nan
    with pytest.raises(ModelError, match="not finite: b"):
        Proof(strategy, comm, ["a", "b", "c"], lambda name: name != "c").moved()
    strategy.moments["b"][1] = 1.0
    Proof(strategy, comm, ["a", "b", "c"], lambda name: name != "c").moved()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_parameter_that_changes_is_named(dtype: torch.dtype) -> None:
    strategy: Any = _Strategy({}, {"a": torch.arange(9, dtype=dtype), "b": torch.ones(5, dtype=dtype)})
    comm: Any = _Comm()
    proof = Proof(strategy, comm, [], lambda name: True)
    proof.kept()
    strategy.kept["a"][[2, 3]] = strategy.kept["a"][[3, 2]]
    with pytest.raises(ModelError, match="frozen parameters have changed while others were trained, on rank 0: a;"):
        proof.kept()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_table_in_the_docs_is_what_the_specs_say() -> None:
    assert table.page() == table.PAGE.read_text(encoding="utf-8"), "type `python -m tests.unit.tuning.table`"


def test_an_adapter_that_peft_has_made_is_started_from(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    made.save_pretrained(tmp_path / "adapter")
    typed = ["tuning=lora", "tuning.rank=3", "tuning.alpha=6", "tuning.targets=[q_proj,o_proj]"]
    _, bundle = tuned(model, *typed, f"tuning.init_from={tmp_path / 'adapter'}")
    expected = {name: param for name, param in made.base_model.model.named_parameters() if param.requires_grad}
    assert len(expected) == 8
    for name, param in expected.items():
        assert torch.equal(bundle.weights.read(name, 0, param.numel()), param.detach().flatten()), name
    with pytest.raises(ModelError, match="lora_alpha: 6 there, 7.0 here"):
        tuned(model, *typed[:2], "tuning.alpha=7", typed[3], f"tuning.init_from={tmp_path / 'adapter'}")


def test_modules_that_are_trained_whole_are_started_from_too(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    made = get_peft_model(base, config)
    learned = next(p for name, p in made.named_parameters() if "embed_tokens.modules_to_save" in name)
    with torch.no_grad():
        learned += 1
    made.save_pretrained(tmp_path / "adapter")
    typed = ["tuning=lora", "tuning.rank=3", "tuning.alpha=8", "tuning.targets=[q_proj]"]
    _, bundle = tuned(
        model, *typed, "tuning.modules_to_save=[embed_tokens]", f"tuning.init_from={tmp_path / 'adapter'}"
    )
    assert torch.equal(bundle.weights.read("model.embed_tokens.weight", 0, learned.numel()), learned.detach().flatten())


def test_prompts_start_from_tokens_and_from_a_folder(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from dtrain.data.tokenizer import TextTokenizer
    from tests.unit.data.fakes import write_tokenizer

    name, places = "prompt_encoder.embedding.weight", "tuning.num_virtual_tokens=5"
    embedding = next(iter(load_file(file)["model.embed_tokens.weight"] for file in model.glob("*.safetensors")
                          if "model.embed_tokens.weight" in load_file(file)))  # fmt: skip
    hidden = embedding.shape[1]
    _, bundle = tuned(model, "tuning=prompt", places)
    drawn = bundle.weights.read(name, 0, 5 * hidden).view(5, hidden)
    assert all((row == embedding).all(1).any() for row in drawn)
    assert len(drawn.unique(dim=0)) > 1
    write_tokenizer(model)
    ids = TextTokenizer.load(model).encode("ab")
    assert 0 < len(ids) < 5
    _, bundle = tuned(model, "tuning=prompt", places, "tuning.init=text", "tuning.text=ab")
    assert torch.equal(bundle.weights.read(name, 0, 5 * hidden).view(5, hidden), embedding[(ids * 5)[:5]])
    kept = torch.randn(5, hidden)
    save_file({"prompt_embeddings": kept}, tmp_path / "adapter_model.safetensors")
    _, bundle = tuned(model, "tuning=prompt", places, f"tuning.init_from={tmp_path}")
    assert torch.equal(bundle.weights.read(name, 3, 7), kept.flatten()[3:10])
    with pytest.raises(ModelError, match=r"\(5, 32\) numbers there, \(4, 32\) here"):
        tuned(model, "tuning=prompt", "tuning.num_virtual_tokens=4", f"tuning.init_from={tmp_path}")


def test_prompts_start_as_the_layers_get_tokens(tmp_path: Path) -> None:
    # Gemma multiplies by the root of the width, 32.
    _, bundle = tuned(write(tmp_path, "gemma3_text"), "tuning=prompt", "tuning.num_virtual_tokens=5",
                      "model.from_scratch=true", "dataset.max_length=32")  # fmt: skip
    hidden = bundle.embedding.shape[1]
    table = bundle.weights.read("model.embed_tokens.weight", 0, bundle.embedding.numel()).view(-1, hidden)
    first = bundle.weights.read("prompt_encoder.embedding.weight", 0, 5 * hidden).view(5, hidden)
    for row in first:
        assert (row / hidden**0.5 - table).abs().amax(1).min() < 1e-6


def test_places_before_documents() -> None:
    # Two rows of six: documents of 2 and 3 and one place of padding; one of 6.
    tokens = torch.tensor([[1, 2, 3, 4, 5, 0], [11, 12, 13, 14, 15, 16]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    wide = widen(tokens, positions, 2)
    assert wide.tokens.tolist() == [[0, 0, 1, 2, 0, 0, 3, 4, 5, 0, 0, 0], [0, 0, 11, 12, 13, 14, 15, 16, 0, 0, 0, 0]]
    assert wide.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert wide.slots.tolist() == [0, 1, 4, 5, 9, 10, 12, 13]
    assert wide.where.tolist() == [2, 3, 6, 7, 8, 11, 14, 15, 16, 17, 18, 19]


def test_ranks_that_are_left_and_those_that_go() -> None:
    how: Any = dataclasses.make_dataclass("How", ["warmup", "final"])(0.1, 0.3)
    course = _adalora.Course.of(how, 10)
    assert course == (1, 7)
    # From 56 to 28 by the third power: 28 + 28 * (1 - (step - 1) / 6) ** 3.
    assert [_adalora.budget(step, course, 56, 28) for step in range(1, 9)] == [56, 44, 36, 31, 29, 28, 28, 28]
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert _adalora.lowest(scores, 0).tolist() == [False] * 4
    assert _adalora.lowest(scores, 1).tolist() == [False, True, False, True]
    assert _adalora.lowest(scores, 3).tolist() == [False, True, True, True]


def test_ranks_of_a_single_step_are_chosen_by_what_it_said() -> None:
    how: Any = AdaLoRA(rank=3, target_rank=1)
    layer = _adalora._Alongside(how, {"a": (2, 2)})
    value = torch.nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))
    optimizer = torch.optim.SGD([value], lr=0.0)
    layer.watch(optimizer)

    def parts() -> Iterator[Shard]:
        views = {"weight": value.detach().view(-1)} | {
            name: optimizer.state[value][name].view(-1) for name in layer.state_names if name in optimizer.state[value]
        }
        yield Shard("a.lora_E.default", (3, 1), 0, views)

    layer.begin(1, 1)
    # An update that was left out has said nothing: all would be the lowest.
    assert not layer.after(1, 1, parts, Solo())
    assert value.flatten().tolist() == [1.0, 2.0, 3.0]
    value.grad = torch.ones_like(value)
    optimizer.step()
    assert set(layer.state_names) == set(optimizer.state[value]), "a checkpoint says that it has them"
    assert layer.after(1, 1, parts, Solo())
    assert value.flatten().tolist() == [0.0, 0.0, 3.0]
