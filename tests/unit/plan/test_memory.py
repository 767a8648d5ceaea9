"""The memory formulas: against the figures of the papers, and against what autograd saves."""

from __future__ import annotations

import pytest

from dtrain.config.compose import choices, group_choice
from dtrain.config.validate import validate_spec
from dtrain.plan.figures import Figures
from dtrain.plan.memory import Need, Shape, estimate
from dtrain.plan.world import Topology

GB = 1e9
PARAMS = 7_500_000_000


def _figures(num_params: int = PARAMS) -> Figures:
    return Figures(hidden=4096, layers=36, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=50257, tied=True,
                   max_positions=2048, num_params=num_params, num_block_params=num_params // 40)  # fmt: skip


def _need(size: int, precision: str = "bf16", trained: int = PARAMS) -> Need:
    return Need(_figures(), trained, precision, 8, Topology(nodes=size // 8 or 1, procs_per_node=min(size, 8)))  # type: ignore[arg-type]


def _states(name: str, need: Need):
    return validate_spec("strategy", group_choice("strategy", name)).states(need)


@pytest.mark.parametrize(("name", "paper", "of_grads"), [
    # ZeRO paper (arXiv 1910.02054, figure 1), 7.5 G parameters on 64 ranks: 16 P, 4 P + 12 P/N, 2 P + 14 P/N, 16 P/N
    # bytes, with gradients in 16 bits. Ours are summed in fp32: 2 bytes more for each gradient that a rank keeps.
    ("zero1", 31.4, 2 * 7.5),
    ("zero2", 16.6, 2 * 7.5 / 64),
    ("zero3", 1.9, 2 * 7.5 / 64),
])  # fmt: skip
def test_the_zero_paper(name: str, paper: float, of_grads: float) -> None:
    s = _states(name, _need(64))
    assert (s.params + s.grads + s.optim) / GB == pytest.approx(paper + of_grads, abs=0.05)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_fp32_shards(name: str) -> None:
    """fp32 masters are the parameters: 4 P of weights, 4 P of gradients, 8 P of Adam's two; the paper's 16 P."""
    over = 1 if name == "ddp" else 64
    s = _states(name, _need(64))
    assert (s.params * over / GB, s.grads * over / GB, s.optim * over / GB) == pytest.approx((30, 30, 60))
    if name == "ddp":
        assert (s.params + s.grads + s.optim) / GB == pytest.approx(120)


def test_gathered_by_hand() -> None:
    """fsdp2: what is outside of the blocks, two blocks in bf16, and one block's gradients in fp32."""
    block, outside = PARAMS // 40, PARAMS - 36 * (PARAMS // 40)
    assert _states("fsdp2", _need(64)).gathered == 2 * (outside + 2 * block) + 4 * block
    # zero1: a bucket of 5e8 elements in fp32
    assert _states("zero1", _need(64)).gathered == 4 * 500_000_000
    # zero3: at most 1e9 live parameters in bf16, and the bucket
    assert _states("zero3", _need(64)).gathered == 2 * 1_000_000_000 + 4 * 500_000_000


@pytest.mark.parametrize("name", [name for name in choices()["strategy"] if name != "auto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_strategies_are_the_same_on_one_rank(name: str, precision: str) -> None:
    """Weights, gradients and two states, and low-precision weights beside masters: 16 P in fp32, up to 18 P in bf16."""
    s = _states(name, _need(1, precision))
    per_param = (s.params + s.grads + s.optim) / PARAMS
    assert per_param in ((16.0, 18.0) if precision == "bf16" else (16.0, 20.0))


@pytest.mark.parametrize("name", [name for name in choices()["strategy"] if name != "auto"])
def test_more_ranks_never_take_more(name: str) -> None:
    totals = [_total(_states(name, _need(size))) for size in (2, 4, 8, 64, 512)]
    assert totals == sorted(totals, reverse=True)


def test_what_is_frozen_has_no_gradient_and_no_state() -> None:
    for name in choices()["strategy"]:
        if name != "auto":
            s = _states(name, _need(8, trained=0))
            assert s.grads == s.optim == 0


def test_offload_moves_to_the_host() -> None:
    spec = validate_spec(
        "strategy", {**group_choice("strategy", "zero3"), "offload_optimizer": "cpu", "offload_param": "cpu"}
    )
    there, here = spec.states(_need(64)), _states("zero3", _need(64))
    assert (there.params, there.optim) == (0, 0)
    assert there.host == here.params + here.optim


def _total(states) -> float:
    return states.params + states.grads + states.optim + states.gathered


# --- activations and loss: formula against what is saved


def _saved_bytes(kind: str, layers: int, dtype: str, *, length: int, recomputed: bool, masks: bool = False) -> int:
    """Bytes that autograd keeps of a decoder, parameters and buffers not counted, each storage once."""
    import torch

    from dtrain.engine.build import recompute
    from dtrain.models.attention.dense import SDPA
    from dtrain.models.attention.documents import DOCUMENTS

    backend = SDPA if masks else DOCUMENTS
    model = _decoder(kind, layers).to(getattr(torch, dtype)).train()
    backend.install(model)
    if recomputed:
        for block in model.layers:
            recompute(block)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    positions = torch.arange(length // 2).repeat(2, 2)  # two rows of two documents
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**backend.lay_out(torch.zeros(2, length, dtype=torch.long), positions))
    return sum(saved.values())


SMALL = {"vocab_size": 64, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "intermediate_size": 352, "max_position_embeddings": 1024}  # fmt: skip


def _decoder(kind: str, layers: int):
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(kind, **SMALL, num_hidden_layers=layers))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("length", "masks"), [(64, True), (512, True), (512, False)])
def test_activations(kind: str, dtype: str, length: int, recomputed: bool, masks: bool) -> None:
    """What two layers more keep, within 15 %; 64 tokens, where matrices are most of it, and 512, where masks are."""
    few, many = (_saved_bytes(kind, n, dtype, length=length, recomputed=recomputed, masks=masks) for n in (1, 3))
    planned = [_activations(kind, n, dtype, length, recomputed, masks) for n in (1, 3)]
    assert planned[1] - planned[0] == pytest.approx(many - few, rel=0.15)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_activations_of_a_whole_decoder(kind: str) -> None:
    measured = _saved_bytes(kind, 3, "bfloat16", length=256, recomputed=False)
    assert _activations(kind, 3, "bfloat16", 256, False) == pytest.approx(measured, rel=0.15)


def _activations(kind: str, layers: int, dtype: str, length: int, recomputed: bool, masks: bool = False) -> float:
    figures = Figures.from_hf({**SMALL, "model_type": kind, "num_hidden_layers": layers})
    need = Need(figures, figures.num_params, "fp32" if dtype == "float32" else "bf16", 8, Topology(1, 1))
    shape = Shape(micro_batch=2, length=length, activation_checkpointing=recomputed, device="cpu", masks=masks)
    return estimate(need, validate_spec("strategy", group_choice("strategy", "ddp")).states(need), shape).activations
