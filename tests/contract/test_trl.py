"""Losses over replies against TRL's for the same batch and the same two models; where TRL is installed."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.data.store import RowStore
from dtrain.objectives._documents import (
    LABELS,
    LEARNED,
    OTHER,
    REFERENCE,
    by_document,
    in_turn,
    log_probs,
    part,
    with_about,
)
from dtrain.objectives._preference import KL, DPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from dtrain.objectives.dpo import DPO
from dtrain.objectives.kto import KTO
from dtrain.objectives.orpo import ORPO
from dtrain.objectives.simpo import SimPO
from tests.contract.preferences import BETA, GAMMA, WEIGHT, make_preferences

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def models(small: Path) -> tuple[Any, Any]:
    """transformers' models: one that training has moved, and the one before."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(small / "model", dtype=torch.float32).eval()
    moved = copy.deepcopy(start)
    torch.manual_seed(3)
    with torch.no_grad():
        for param in moved.parameters():
            param += 0.05 * torch.randn_like(param)
    return moved, start


@pytest.fixture(scope="module")
def ours(small: Path, models: tuple[Any, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    from dtrain.models._causal import build_causal

    found = []
    for model in models:
        module = build_causal(small / "model", seed=0).module
        module.load_state_dict(model.state_dict(), assign=True, strict=False)
        found.append(module.eval())
    return found[0], found[1]


@pytest.fixture(scope="module")
def rows(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("trl") / "data"
    make_preferences(folder, small / "model")
    store = RowStore(folder / "train.arrow")
    return [store.row(i) for i in range(6)]


def padded(documents: list[tuple[np.ndarray, np.ndarray]], prefix: str = "") -> dict[str, torch.Tensor]:
    width = max(len(tokens) for tokens, _ in documents)
    ids, mask, learned = (torch.zeros(len(documents), width, dtype=torch.long) for _ in range(3))
    for i, (tokens, targets) in enumerate(documents):
        ids[i, : len(tokens)], learned[i, : len(tokens)] = torch.tensor(tokens), torch.tensor(targets).long()
        mask[i, : len(tokens)] = 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": learned}


def split(rows: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    edges = [np.cumsum(row.lengths)[:-1] for row in rows]
    return [pair for row, at in zip(rows, edges, strict=True)
            for pair in zip(np.split(row.tokens, at), np.split(row.targets, at), strict=True)]  # fmt: skip


def trainer(
    cls: Any, config: Any, models: tuple[Any, Any], tmp_path: Path, rows: list[dict[str, Any]], **args: Any
) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.unit.data.fakes import write_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    settings = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                      per_device_train_batch_size=2, **args)  # fmt: skip
    return cls(model=copy.deepcopy(models[0]), ref_model=models[1], args=settings, train_dataset=Dataset.from_list(rows),
               processing_class=tokenizer)  # fmt: skip


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo(models: Any, ours: Any, rows: list[Any], tmp_path: Path, loss: str) -> None:
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    peer = trainer(trl.DPOTrainer, trl.DPOConfig, models, tmp_path, text, beta=BETA, loss_type=loss)
    peer.model.eval()
    documents = split(rows)
    with torch.no_grad():
        expected = float(peer.compute_loss(peer.model, padded([*documents[0::2], *documents[1::2]])))
        batch = by_document(rows, list(range(len(rows))), 0, each=2)
        batch = with_about(batch, {REFERENCE: log_probs(ours[1], batch)})
        got = DPOLoss(DPO(beta=BETA, loss=loss))(ours[0], batch)
    print(f"dpo {loss}: TRL {expected:.7f}, dtrain {float(got.total) / got.num_targets:.7f}")
    assert float(got.total) / got.num_targets == pytest.approx(expected, rel=1e-5)


def test_kto(models: Any, ours: Any, rows: list[Any], tmp_path: Path) -> None:
    text = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    peer = trainer(
        trl.KTOTrainer, trl.KTOConfig, models, tmp_path, text, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5
    )
    peer.model.eval()
    documents = split(rows)
    labels = [bool(label) for row in rows for label in row.labels]
    with torch.no_grad():
        inputs = {**padded(documents[0::2]), **padded(documents[1::2], "KL_"), "label": torch.tensor(labels)}
        expected = float(peer.compute_loss(peer.model, inputs))
        batch = in_turn(rows, list(range(len(rows))), 0)
        other = part(batch, OTHER)
        kl = (log_probs(ours[0], other) - log_probs(ours[1], other)).mean().clamp(min=0)
        batch = with_about(batch, {REFERENCE: log_probs(ours[1], batch), KL: kl})
        got = KTOLoss(KTO(beta=BETA, good_weight=1.5, bad_weight=0.5))(ours[0], batch)
    assert batch.about[LABELS].tolist() == [int(label) for label in labels]
    print(f"kto: TRL {expected:.7f}, dtrain {float(got.total) / got.num_targets:.7f}, kl {float(kl):.4f}")
    assert float(got.total) / got.num_targets == pytest.approx(expected, rel=1e-5)


def test_simpo_and_the_odds_ratio_of_orpo(ours: Any, rows: list[Any]) -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = by_document(rows, list(range(len(rows))), 0, each=2)
    with torch.no_grad():
        means = log_probs(ours[0], batch) / batch.about[LEARNED]
        here = types.SimpleNamespace(device="cpu")
        peer: Any = types.SimpleNamespace(alpha=0.0, beta=BETA, simpo_gamma=GAMMA, label_smoothing=0.0, loss_type="simpo",
                                          accelerator=here)  # fmt: skip
        expected = float(CPOTrainer.cpo_loss(peer, means[0::2], means[1::2])[0].mean())
        got = SimPOLoss(SimPO(beta=BETA, gamma=GAMMA))(ours[0], batch)
        print(f"simpo: TRL {expected:.7f}, dtrain {float(got.total) / got.num_targets:.7f}")
        assert float(got.total) / got.num_targets == pytest.approx(expected, rel=1e-5)
        peer = types.SimpleNamespace(beta=WEIGHT, accelerator=here)
        odds = ORPOTrainer.odds_ratio_loss(peer, means[0::2], means[1::2])[0].mean()
        expected = float(-means[0::2].mean() - odds)  # TRL's own cross-entropy is over the prompts too
        got = ORPOLoss(ORPO(weight=WEIGHT))(ours[0], batch)
        print(f"orpo: TRL {expected:.7f}, dtrain {float(got.total) / got.num_targets:.7f}")
        assert float(got.total) / got.num_targets == pytest.approx(expected, rel=1e-5)
