"""Decoders with outputs of their own in place of the vocabulary: transformers' models for sequence classification."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models._causal import CausalLM, blocks_of, refuse_what_is_lost
from dtrain.models._meta import params_on_meta
from dtrain.models._weights import FreshWeights, Names, SafetensorsWeights, stored_files
from dtrain.models.attention.choose import choose
from dtrain.models.attention.names import MASKED, Attention
from dtrain.models.base import AbstractWeights, ModelBundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "score"


class Score(nn.Module):
    """The output projection of `linear`, under the same parameter names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: torch.Tensor = linear.weight

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, outputs] in fp32, which costs nothing here."""
        return hidden_NH.float() @ self.weight.float().t()


@final
class _WithFresh(AbstractWeights):
    """Weights of files, but for some parameters that these do not have."""

    def __init__(self, stored: AbstractWeights, fresh: AbstractWeights, names: frozenset[str]) -> None:
        self._stored, self._fresh, self._names = stored, fresh, names

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        return (self._fresh if name in self._names else self._stored).read(name, start, numel)


def build_scored(
    assets: Path, *, seed: int, attention: Attention, trust_remote_code: bool, from_scratch: bool
) -> ModelBundle:
    """As `build_causal`, from a folder that `with_outputs` made, or such an export. Where the files have no outputs
    yet, these are fresh. Raises ModelError.
    """
    model, language = _on_meta(assets, attention, trust_remote_code=trust_remote_code)
    refuse_what_is_lost(model, assets)
    linear = getattr(model, _NAME, None)
    if not isinstance(linear, nn.Linear) or linear.bias is not None or model.base_model is model:
        raise ModelError(f"{type(model).__name__}: not a decoder followed by one linear layer `{_NAME}`, which is what "
                         f"dtrain trains")  # fmt: skip
    shapes = {key: param.shape for key, param in model.named_parameters()}
    fresh = FreshWeights(copy.deepcopy(model), seed)
    weights: AbstractWeights = fresh
    if not from_scratch:
        new = frozenset({f"{_NAME}.weight"} - set(stored_files(assets)))
        ignored = [r"rotary_emb\.inv_freq$", r"^lm_head\.", r"^embed_out\."]
        names = Names(prefix=model.base_model_prefix, tied=(), ignored=ignored)
        stored = SafetensorsWeights.open(assets, {key: one for key, one in shapes.items() if key not in new}, names)
        weights = _WithFresh(stored, fresh, new)
    module = CausalLM(model, Score(linear), _NAME)
    assert {key for key, _ in module.named_parameters()} == set(shapes), "the wrapper must keep the names"
    module.train()
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, nn.Parameter), type(embedding)
    return ModelBundle(
        module=module,
        blocks=blocks_of(model),
        weights=weights,
        export_name=str,
        assets=assets,
        embedding=embedding,
        head=linear.weight,
        outputs=_NAME,
        choose_attention=functools.partial(choose, module, language, attention),
    )


def _on_meta(
    assets: Path, attention: Attention, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, type[PreTrainedModel]]:
    """The model, and the class of the language model with the same decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    further: dict[str, Any] = {"attn_implementation": attention} if attention in MASKED else {}
    try:
        config = AutoConfig.from_pretrained(assets, trust_remote_code=trust_remote_code)
        made = []
        with params_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in (AutoModelForSequenceClassification, AutoModelForCausalLM):
                made.append(kind.from_config(copy.deepcopy(config), dtype=torch.float32,
                                             trust_remote_code=trust_remote_code, **further))  # fmt: skip
    except (ValueError, ImportError, KeyError, OSError) as e:
        raise ModelError(f"{assets}: transformers does not build a model for sequence classification from config.json: "
                         f"{e}") from e  # fmt: skip
    return made[0], type(made[1])
