"""Windows and soft-capped scores by every back end that a CPU has, under strategies that divide the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contract.small import LENGTH, VOCAB, Recipe, overrides, reference, train
from tests.contract.test_equivalence import difference
from tests.processes import run_ranks

RECIPE = Recipe(3, steps=3, warmup_steps=1)


@pytest.fixture(scope="module")
def models(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders like `small`, with windows of 3 tokens, and with scores capped at 1 besides."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "intermediate_size": 56, "max_position_embeddings": 2 * LENGTH, "initializer_range": 0.1,
             "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "sliding_window": 3}  # fmt: skip
    capped = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8, "final_logit_softcapping": None}
    made = {}
    for kind, further in (("mistral", {}), ("gemma2", capped)):
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes, **further)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        model.save_pretrained(folder / "model")
        for name in ("train.arrow", "eval.arrow"):
            (folder / name).symlink_to(small / name)
    return made


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("kind", "attention"), [("mistral", "documents"), ("gemma2", "document_scores"), ("mistral", "eager")]
)
def test_packed_training_is_that_of_documents_alone(
    models: dict[str, Path], kind: str, attention: str, strategy: str
) -> None:
    folder = models[kind]
    expected = reference(folder, RECIPE)
    typed = overrides(folder, RECIPE, f"strategy={strategy}", f"model.attention={attention}",
                      "train.activation_checkpointing=true")  # fmt: skip
    for got in run_ranks(train, folder, typed, size=2):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        for name, weight in expected.weights.items():
            assert difference(got.weights[name], weight) < 1e-5, name


def _chosen_where_one_rank_cannot(folder: Path, typed: list[str]) -> tuple[str, dict[str, str]]:
    import os

    from dtrain.models.attention.probe import Probe
    from tests.contract.small import make_built

    fault = Probe.fault
    Probe.fault = lambda self, backend: (  # type: ignore[method-assign]
        "it is not there" if os.environ["RANK"] == "1" and backend.name == "documents" else fault(self, backend)
    )
    attention = make_built(folder, typed).attention
    return attention.name, dict(attention.passed_over)


def test_all_ranks_take_what_all_of_them_can(models: dict[str, Path]) -> None:
    typed = overrides(models["mistral"], RECIPE, "strategy=ddp")
    said = run_ranks(_chosen_where_one_rank_cannot, models["mistral"], typed, size=2)
    assert said[0] == said[1]
    assert (said[0][0], said[0][1]["documents"]) == ("document_scores", "it is not there (rank 1)")
