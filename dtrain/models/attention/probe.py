"""Whether attention keeps the documents of a row apart, found out on a small copy of the model before it is used.

The copy has the model's own layers, few and narrow, with weights that make scores matter, and windows so short that the
documents feel them. What it gives for packed rows is held against each document alone, by transformers' plain attention
in fp32: hidden states, and gradients. Then a document is changed, and the others must not notice.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models._meta import params_on_meta
from dtrain.models.attention.base import Backend, quiet
from dtrain.models.attention.dense import EAGER

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dtrain.models.base import Setting

LENGTHS = (7, 5, 5, 9)
"""Of the documents: two in each row where rows are packed, of unequal lengths, and two of the same."""
_VOCAB, _WINDOW, _SOFTCAP, _INTERMEDIATE, _MOST_LAYERS = 64, 3, 1.0, 64, 6
_MOST_PARAMS = 30_000_000
_ALIKE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative difference from the documents alone in fp32: more than rounding makes of it (1e-6, in bf16 3e-2), also where
a GPU multiplies in 19 bits; what is computed in another way differs by some tenths."""
_UNMOVED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative difference that another document's change may make: none, as a rule."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """All [B, T]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    document: torch.Tensor
    """Its number; -1 for padding."""

    @classmethod
    def make(cls, *, packed: bool, generator: torch.Generator) -> _Rows:
        rows = [(0, 1), (2, 3)] if packed else [(0,), (1,), (2,), (3,)]
        # The shorter ones end in padding, which counts its own positions.
        width = max(sum(LENGTHS[i] for i in row) for row in rows)
        positions, document = [], []
        for row in rows:
            left = width - sum(LENGTHS[i] for i in row)
            parts = [*((i, LENGTHS[i]) for i in row), (-1, left)]
            positions.append(torch.cat([torch.arange(length) for _, length in parts]))
            document.append(torch.cat([torch.full((length,), i) for i, length in parts]))
        tokens = torch.randint(1, _VOCAB, (len(rows), width), generator=generator)
        return cls(tokens, torch.stack(positions), torch.stack(document))


class Probe:
    """A small copy of a model and what it should give. Leaves all random generators as they are."""

    def __init__(self, kind: type[PreTrainedModel], config: PretrainedConfig, setting: Setting) -> None:
        """Raises ModelError where no copy can be made."""
        self._setting = setting
        why = ""
        for changes in (_narrow, _shallow):
            try:
                with _untouched(setting.device), quiet():
                    self._make(kind, changes(config))
                return
            except Exception as e:  # noqa: BLE001  a configuration's checks and a model's own code may raise anything
                why = why or _words(e)
        raise ModelError(f"no small copy of it can be made: {why}")

    def _make(self, kind: type[PreTrainedModel], config: PretrainedConfig) -> None:
        setting, generator = self._setting, torch.Generator().manual_seed(0)
        self._decoder = _decoder(kind, config, setting, generator)
        rows = _Rows.make(packed=setting.packed, generator=generator)
        self._rows = _Rows(*(getattr(rows, f.name).to(setting.device) for f in dataclasses.fields(rows)))
        draw = torch.randn(rows.tokens.numel(), config.get_text_config().hidden_size, generator=generator)
        # Every second document is asked whether it notices; the others are changed.
        document = self._rows.document.flatten()
        self._judged = (document >= 0) & ((document % 2 == 1) | (not setting.packed))
        self._cotangent = draw.to(setting.device) * self._judged[:, None]
        self._hidden, self._grad = self._alone()
        for param in self._decoder.parameters():
            param.data = param.data.to(setting.dtype)

    def fault(self, backend: Backend) -> str | None:
        """What is wrong with this back end here; None where nothing is."""
        try:
            with _untouched(self._setting.device), quiet():
                backend.install(self._decoder)
                return self._compare(backend)
        except Exception as e:  # noqa: BLE001  kernels raise what they like, and there are other back ends
            return _words(e)

    def _compare(self, backend: Backend) -> str | None:
        rows, dtype = self._rows, self._setting.dtype
        hidden, grad = self._run(backend, rows.tokens, rows.positions, self._cotangent)
        other = torch.where(self._judged.view_as(rows.tokens), rows.tokens, rows.tokens % (_VOCAB - 1) + 1)
        moved, _ = self._run(backend, other, rows.positions, self._cotangent)
        real, judged = rows.document.flatten() >= 0, self._judged
        unmoved, alike = _UNMOVED[dtype], _ALIKE[dtype]
        if not (leak := _far(moved[judged], hidden[judged])) <= unmoved:
            return f"leaks: a change in one document moves another by {leak:.1g}"
        if not (leak := float(grad[~judged].norm() / grad.norm())) <= unmoved:
            return f"leaks: a document has a gradient of {leak:.1g} by another's loss"
        if not (far := _far(hidden[real], self._hidden[real])) <= alike:
            return f"differs from each document alone by {far:.1g}"
        if not (far := _far(grad[judged], self._grad[judged])) <= alike:
            return f"gradients differ from those of each document alone by {far:.1g}"
        return None

    def _alone(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and gradients of each document by itself, at its places in the rows."""
        with contextlib.suppress(ModelError), quiet():
            EAGER.install(self._decoder)
        hidden, grad = torch.zeros_like(self._cotangent), torch.zeros_like(self._cotangent)
        flat = self._rows.document.flatten()
        for i in range(len(LENGTHS)):
            at = flat == i
            tokens, positions = (x.flatten()[at][None] for x in (self._rows.tokens, self._rows.positions))
            hidden[at], grad[at] = self._run(EAGER, tokens, positions, self._cotangent[at])
        return hidden, grad

    def _run(
        self, backend: Backend, tokens: torch.Tensor, positions: torch.Tensor, cotangent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, and the gradient by embeddings of their product with `cotangent`; [tokens, width], fp32."""
        kept: list[torch.Tensor] = []
        hook = self._decoder.get_input_embeddings().register_forward_hook(lambda module, args, out: kept.append(out))
        try:
            with torch.enable_grad():
                hidden = self._decoder(**backend.lay_out(tokens, positions)).last_hidden_state
                hidden = hidden.reshape(cotangent.shape).float()
                (grad,) = torch.autograd.grad((hidden * cotangent).sum(), kept[0])
        finally:
            hook.remove()
        return hidden.detach(), grad.reshape(len(cotangent), -1).float()


def _far(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def _words(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, ModelError) else f"{type(error).__name__}: {line[:200]}"


@contextlib.contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Random generators are afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _decoder(
    kind: type[PreTrainedModel], config: PretrainedConfig, setting: Setting, generator: torch.Generator
) -> PreTrainedModel:
    """On the device, in training; parameters are fp32, with values that the precision has. Raises ModelError."""
    with params_on_meta():
        decoder: PreTrainedModel = kind._from_config(config, dtype=torch.float32).base_model
    if sum(param.numel() for param in decoder.parameters()) > _MOST_PARAMS:
        raise ModelError("its layers are too wide")
    _fill(decoder, setting, generator)
    return decoder.train()


def _fill(decoder: PreTrainedModel, setting: Setting, generator: torch.Generator) -> None:
    """Values for parameters that are on meta; buffers go to the device as they are."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in decoder.modules():
        for name, param in module.named_parameters(recurse=False):
            if param not in made:
                made[param] = nn.Parameter(_values(module, name, param, generator).to(setting.dtype).float())
            setattr(module, name, made[param])
    nn.Module.to(decoder, setting.device)


def _values(module: nn.Module, name: str, param: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Of the size that keeps activations at 1, and scores at several; norms near 1, biases near 0."""
    draw = torch.empty(param.shape).uniform_(-1, 1, generator=generator)
    if param.ndim < 2:
        return 0.3 * draw + (0.0 if "bias" in name else 1.0)
    inner = 1 if isinstance(module, nn.Embedding) else param[0].numel()
    return draw * (1.5 * math.sqrt(3 / inner))


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Few heads of the same width and ratio, and the rest to suit."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None)
    few = (2 if 2 * (heads // kv_heads) <= 8 else 1) * (heads // kv_heads)
    changes = {
        "num_attention_heads": few,
        "num_key_value_heads": few // (heads // kv_heads),
        "hidden_size": 16 * few if head_dim else few * (text.hidden_size // heads),
        "intermediate_size": _INTERMEDIATE,
        "head_dim": head_dim,
    }
    return _changed(config, changes)


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    return _changed(config, {})


def _changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """With these values, a layer or two of each kind, a small vocabulary, short windows, low caps and no dropout."""
    if config.get_text_config() is not config:
        raise ModelError("its configuration is nested")
    plain = config.to_dict()
    num = config.num_hidden_layers
    by_layer = {key: value for key, value in plain.items() if isinstance(value, list) and len(value) == num}
    kinds = {repr([value[i] for value in by_layer.values()]): i for i in reversed(range(num))}
    layers = sorted(kinds.values())[:_MOST_LAYERS] if len(kinds) > 1 else list(range(min(2, num)))
    new: dict[str, Any] = {key: [value[i] for i in layers] for key, value in by_layer.items()}
    new |= {config.attribute_map.get(key, key): value for key, value in changes.items()
            if config.attribute_map.get(key, key) in plain and value is not None}  # fmt: skip
    new[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    new["vocab_size"] = _VOCAB
    for key, value in plain.items():
        if isinstance(value, float) and "drop" in key:
            new[key] = 0.0
        elif isinstance(value, int) and key in ("sliding_window", "attention_chunk_size", "window_size"):
            new[key] = min(_WINDOW, value)
        elif value is not None and key == "attn_logit_softcapping":
            new[key] = _SOFTCAP
        elif value is not None and key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            new[key] = 0
    return type(config).from_dict({**copy.deepcopy(plain), **new})
