"""Every back end that runs here against each document alone, by transformers' plain attention; and what refuses others."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dtrain.comm import AbstractComm
from dtrain.config.compose import choices, group_choice
from dtrain.data.collate import collate
from dtrain.data.rows import Row
from dtrain.engine.build import recompute
from dtrain.errors import ModelError
from dtrain.models._causal import build_causal
from dtrain.models.attention.base import Asked
from dtrain.models.attention.choose import BACKENDS
from dtrain.models.attention.dense import EAGER, SDPA
from dtrain.models.attention.documents import DOCUMENTS, FEW, SCORES, Documents
from dtrain.models.attention.names import MASKED, Attention
from dtrain.models.attention.probe import Probe
from dtrain.models.attention.varlen import VARLEN
from dtrain.models.base import Setting
from tests.unit.models.conftest import write_config

WINDOW = 5
KINDS = {
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mistral-whole": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": WINDOW},
    "phi3": {"pad_token_id": 0, "sliding_window": WINDOW},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "cohere": {},
}  # fmt: skip
LENGTHS = ((150, 3, 1, 20, 17, 9), (40, 40, 2, 60, 5, 16, 31))
"""Of the documents of two rows; one is longer than a block of queries, the second row ends in padding."""
CPU = torch.device("cpu")


class Solo(AbstractComm):
    """One process."""

    rank, size, device = 0, 1, CPU

    def sum(self, values: Sequence[float], *, step: int | None = None) -> list[float]:
        return list(values)

    def max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: str) -> list[str]:
        return [value]

    def sibling(self) -> AbstractComm:
        return self

    def barrier(self) -> None: ...


def setting(dtype=torch.float32, *, packed=True):
    return Setting(CPU, dtype, packed)


def write(folder, kind):
    return write_config(folder / kind, kind.split("-")[0], max_position_embeddings=256, **KINDS[kind])


def rows_of(lengths=LENGTHS):
    draw, rows = np.random.default_rng(0), []
    for row in lengths:
        targets = np.ones(sum(row), np.bool_)
        targets[np.concatenate([[0], np.cumsum(row)[:-1]])] = False
        rows.append(Row(draw.integers(1, 60, sum(row)).astype(np.int32), targets, np.array(row, np.int32)))
    return rows


def alone(peer, rows):
    """The sum of the losses of each document by itself, by transformers' own model and head."""
    total = 0
    for row in rows:
        start = 0
        for length in row.lengths.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length].astype(np.int64))
            logits = peer(input_ids=ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            start += length
    return total


@pytest.fixture
def pair(tmp_path):
    """A loaded module, and transformers' model with the same weights and plain attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.unit.models.conftest import load

    def _pair(kind):
        folder = write(tmp_path, kind)
        bundle = build_causal(folder, seed=0, from_scratch=True)
        module = load(bundle)
        with torch.no_grad():
            for param in module.parameters():  # so that who sees whom matters
                if param.ndim > 1:
                    param.mul_(8)
        config = AutoConfig.from_pretrained(folder)
        peer = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        peer.load_state_dict(module.state_dict())
        return bundle, module, peer

    return _pair


def asked(kind, tmp_path, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write(tmp_path, kind))
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return dataclasses.replace(Asked.of(model_class, config, setting()), **changes)


def test_the_names_are_those_that_can_be_typed():
    assert [
        "auto",
        *(one.name for one in sorted(BACKENDS, key=lambda one: list(Attention.__args__).index(one.name))),
    ] == list(Attention.__args__)
    assert {one.name for one in (SDPA, EAGER)} == MASKED


def test_what_needs_a_gpu_is_refused_before_anything_is_started(tmp_path):
    from dtrain.models.tiny import Tiny

    can = asked("qwen2", tmp_path)
    for backend in BACKENDS:
        said = Tiny(attention=backend.name).misfits("cpu")
        assert bool(said) == (backend.lacks(can) is not None), backend.name
        assert all(f"model.attention={backend.name}: trains on CUDA only, and device=cpu; " in one for one in said)
        assert Tiny(attention=backend.name).misfits("cuda") == []
        assert Tiny(attention=backend.name).masks() == (backend in (SDPA, EAGER))
    assert Tiny().misfits("cpu") == []


def test_every_family_that_has_a_preset_is_tested():
    families = {one["architecture"]["model_type"] for name in choices()["model"]
                if "architecture" in (one := group_choice("model", name))}  # fmt: skip
    assert families <= {kind.split("-")[0] for kind in KINDS}


CAN = [(kind, one) for kind in KINDS for one in (DOCUMENTS, SCORES, SDPA, EAGER)
       if kind != "gemma2" or one in (SCORES, EAGER)]  # fmt: skip
"""What runs on a CPU; the probe's tests below see that no more does."""


@pytest.mark.parametrize(("kind", "backend"), CAN, ids=lambda one: getattr(one, "name", one))
def test_packed_rows_are_their_documents_alone(pair, kind, backend):
    _, module, peer = pair(kind)
    module.attend_by(backend)
    rows = rows_of()
    batch = collate(rows, range(len(rows)), 0)
    total, want = module(**batch.inputs), alone(peer, rows)
    torch.testing.assert_close(total, want, rtol=3e-6, atol=0)
    total.backward()
    want.backward()
    theirs = dict(peer.named_parameters())
    for name, param in module.named_parameters():
        scale = float(theirs[name].grad.abs().max())
        torch.testing.assert_close(
            param.grad, theirs[name].grad, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_few_documents_are_gone_through_in_place_and_many_short_ones_together():
    def of(lengths):
        return Documents.of(torch.cat([torch.arange(length) for length in lengths])[None])

    few = of([3, 3, 200, 3])
    assert ([(one.num, one.length) for one in few.groups], few.places) == ([(2, 3), (1, 200), (1, 3)], None)
    lengths = [150, 20, 7, 31, 16, 1, 17, 33, 150, 128, 32]
    assert sum(length <= 128 for length in lengths) >= FEW
    many = of(lengths)
    # 7, 16 and 1 are filled up to 16; 20, 31, 17 and 32 to 32; 33 to 48; 128 is there; longer ones stay as they are.
    assert [(one.num, one.length) for one in many.groups] == [(3, 16), (4, 32), (1, 48), (1, 128), (2, 150)]
    assert len(many.places) == sum(one.num * one.length for one in many.groups)
    assert torch.equal(many.places[many.tokens], torch.arange(sum(lengths)))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = 0
    for group in many.groups:
        for _ in range(group.num):
            there = many.places[at : at + group.length]
            assert len(document[there].unique()) == 1
            length = lengths[document[there[0]]]
            assert (there.diff() == 1).sum() == length - 1  # all of it in order, then its last token again
            at += group.length


@pytest.mark.parametrize("backend", [DOCUMENTS, SCORES, SDPA], ids=lambda one: one.name)
def test_recomputed_activations_have_the_same_gradients(pair, backend):
    bundle, module, _ = pair("mistral")
    module.attend_by(backend)
    batch = collate(rows_of(), (0, 1), 0)
    module(**batch.inputs).backward()
    want = {name: param.grad.clone() for name, param in module.named_parameters()}
    module.zero_grad()
    for block in bundle.blocks:
        recompute(block)
    module(**batch.inputs).backward()
    for name, param in module.named_parameters():
        assert torch.equal(param.grad, want[name]), name


@pytest.mark.parametrize("backend", [DOCUMENTS, SCORES], ids=lambda one: one.name)
def test_low_precision_by_autocast(pair, backend):
    _, module, peer = pair("qwen2")
    module.attend_by(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = module(**collate(rows_of(), (0, 1), 0).inputs)
        want = alone(peer, rows_of())
    assert total.item() == pytest.approx(want.item(), rel=4e-3)  # 2^-8


def test_dropout_is_the_models(pair, tmp_path):
    _, module, _ = pair("qwen2")
    module.attend_by(DOCUMENTS)
    batch = collate(rows_of(), (0, 1), 0).inputs
    plain = module(**batch)
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(1)
    first, second = module(**batch), module(**batch)
    torch.manual_seed(1)
    assert torch.equal(module(**batch), first)
    assert len({plain.item(), first.item(), second.item()}) == 3
    module.eval()
    assert torch.equal(module(**batch), plain)


# --- the probe


def kind_of(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM._model_mapping[type(config)], config


def probe(tmp_path, kind, **changes):
    return Probe(*kind_of(write(tmp_path, kind)), setting(**changes))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_passes_what_is_right(tmp_path, kind, dtype, packed):
    made, can = probe(tmp_path, kind, dtype=dtype, packed=packed), asked(kind, tmp_path)
    faults = {one.name: made.fault(one) for one in BACKENDS if one.lacks(can) is None}
    assert faults == {one.name: None for name, one in CAN if name == kind}


def changed(backend, **changes):
    """The back end with something in what its function is given changed, under a name of its own."""

    def forward(*args, **kwargs):
        return backend.function(*args, **{**kwargs, **changes})

    return dataclasses.replace(backend, implementation=f"changed_{'_'.join(changes)}", function=forward)


def one_document(positions):
    return {"documents": Documents.of(torch.arange(positions.numel())[None])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "backend", "why"),
    [
        ("qwen2", dataclasses.replace(DOCUMENTS, further=one_document), "leaks: a change"),
        (
            "qwen2",
            dataclasses.replace(SDPA, implementation="dtrain_documents", further=lambda positions: {}),
            "hand on",
        ),
        ("qwen2", changed(DOCUMENTS, scaling=0.1), "differs from each document alone"),
        ("mistral", changed(DOCUMENTS, sliding_window=None), "differs from each document alone"),
        ("gemma2", changed(SCORES, softcap=None), "differs from each document alone"),
        ("gemma2", DOCUMENTS, "caps no scores"),
        ("gemma2", SDPA, "does not support"),
        ("qwen2", VARLEN, "Error"),
    ],
    ids=[
        "a row as one document",
        "documents not handed on",
        "scale",
        "window",
        "cap",
        "cannot cap",
        "sdpa cannot cap",
        "raises",
    ],
)
def test_the_probe_refuses(tmp_path, kind, backend, why, dtype):
    made = probe(tmp_path, kind, dtype=dtype)
    assert made.fault(DOCUMENTS if kind != "gemma2" else SCORES) is None
    assert why in (made.fault(backend) or "")


def test_the_probe_looks_at_gradients_too(tmp_path):
    def forward(module, query, key, value, *args, **kwargs):
        return DOCUMENTS.function(module, query, key, value.detach(), *args, **kwargs)

    detached = dataclasses.replace(DOCUMENTS, implementation="detached", function=forward)
    assert "gradients differ" in probe(tmp_path, "qwen2").fault(detached)


def test_the_probe_leaves_random_generators_alone(tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert probe(tmp_path, "qwen2").fault(DOCUMENTS) is None
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- the choice


def chosen(folder, attention="auto", *, packed=True, dtype=torch.float32):
    bundle = build_causal(folder, seed=0, attention=attention, from_scratch=True)
    return bundle, bundle.choose_attention(setting(dtype, packed=packed), Solo())


def test_auto_takes_the_first_that_passes_and_says_what_came_before(tmp_path):
    _, choice = chosen(write(tmp_path, "qwen2"))
    assert choice.name == "documents"
    assert choice.line == (
        "attention by documents, which keeps documents apart here; flash_attention_3, flash_attention_2, varlen: needs CUDA"
    )
    _, choice = chosen(write(tmp_path, "gemma2"))
    assert (choice.name, choice.passed_over["documents"]) == ("document_scores", "caps no scores")


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "flex_attention"])
def test_a_named_one_that_cannot_is_refused_with_the_way_out(tmp_path, name):
    with pytest.raises(ModelError, match=f"model.attention={name}: .* CPU|CUDA.*model.attention=auto takes what works"):
        chosen(write(tmp_path, "qwen2"), name)


@pytest.mark.parametrize("name", ["documents", "document_scores", "sdpa", "eager"])
def test_a_named_one_is_taken(tmp_path, name):
    bundle, choice = chosen(write(tmp_path, "qwen2"), name)
    assert (choice.name, choice.passed_over) == (name, {})
    implementation = next(one.implementation for one in BACKENDS if one.name == name)
    assert bundle.module.model.config._attn_implementation == implementation


def test_a_named_one_that_leaks_is_refused(tmp_path, monkeypatch):
    leaking = dataclasses.replace(DOCUMENTS, further=one_document)
    monkeypatch.setattr("dtrain.models.attention.choose.BACKENDS", (leaking, EAGER))
    with pytest.raises(ModelError, match=r"model.attention=documents: leaks: .*; model.attention=auto"):
        chosen(write(tmp_path, "qwen2"), "documents")
    _, choice = chosen(write(tmp_path, "qwen2"))
    assert choice.name == "eager"
    assert choice.passed_over["documents"].startswith("leaks")
    monkeypatch.setattr("dtrain.models.attention.choose.BACKENDS", (leaking,))
    with pytest.raises(
        ModelError,
        match=r"(?s)nothing keeps the documents of Qwen2ForCausalLM apart on cpu; set dataset.packing=false.*\n  documents: leaks",
    ):
        chosen(write(tmp_path, "qwen2"))


def test_layers_that_take_nothing_from_outside_fall_back_to_masks(tmp_path):
    _, choice = chosen(write_config(tmp_path / "m", "stablelm"))
    assert choice.name == "sdpa"
    assert choice.passed_over["documents"] == "the model's layers take no attention from outside"


def test_a_model_that_goes_by_no_positions_is_refused_packed(tmp_path):
    # Its attention counts tokens from the start of the row.
    folder = write_config(tmp_path / "m", "mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
    with pytest.raises(
        ModelError, match=r"(?s)MptForCausalLM apart on cpu; set dataset.packing=false.*\n  eager: leaks"
    ):
        chosen(folder)
    with pytest.raises(ModelError, match=r"model.attention=eager: leaks: .*; model.attention=auto takes"):
        chosen(folder, "eager")
    assert chosen(folder, packed=False)[1].name == "eager"


def test_layers_that_are_no_attention_are_tried_too(tmp_path):
    # A convolution over the row mixes documents whatever attention does.
    folder = write_config(tmp_path / "m", "lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48)
    with pytest.raises(ModelError, match="leaks"):
        chosen(folder)


def test_a_model_that_cannot_be_tried_out_keeps_its_masks_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.models.attention.probe._MOST_PARAMS", 100)
    _, choice = chosen(write(tmp_path, "qwen2"))
    assert (choice.name, choice.passed_over["documents"]) == ("sdpa", "cannot be tried out")
    assert choice.why == "not tried out: no small copy of it can be made: its layers are too wide"


def test_the_choice_changes_no_prepared_tokenizer(tmp_path):
    from dtrain.models.tiny import Tiny

    texts = ["some text"] * 9
    assert Tiny(attention="eager").assets(lambda: texts, tmp_path) == Tiny().assets(lambda: texts, tmp_path)
    assert json.loads((Tiny().assets(lambda: texts, tmp_path) / "config.json").read_text())["model_type"] == "qwen2"
