"""Causal language models of transformers, built without weights and called without logits."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models._head import Head, Logits
from dtrain.models._loss import choose as choose_loss
from dtrain.models._meta import params_on_meta
from dtrain.models._weights import FreshWeights, Names, SafetensorsWeights
from dtrain.models.attention.choose import choose
from dtrain.models.attention.dense import SDPA
from dtrain.models.attention.names import MASKED, Attention
from dtrain.models.base import AbstractWeights, ModelBundle
from dtrain.models.loss import Loss
from dtrain.models.outputs import has_outputs
from dtrain.models.virtual import AbstractVirtual, Attended, Wide, hand_over, widen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dtrain.models.attention.base import Backend


class CausalLM(nn.Module):
    """A decoder and its head, named as in transformers; gives the sum of the cross-entropy over targets, or the
    log-probability of each, or what a head of another kind makes of the places it is to look at.

    Documents of a packed row do not see each other: their positions restart, and attention goes by that.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, head_name: str) -> None:
        """`head`: a `Head`, or what takes the hidden states at some places."""
        super().__init__()
        self.decoder_name = model.base_model_prefix
        self.head_name = head_name
        self._lay_out = SDPA.lay_out
        self.virtual: AbstractVirtual | None = None
        self._now: list[Attended] = []
        self.add_module(self.decoder_name, model.base_model)
        self.add_module(head_name, head)

    @property
    def decoder_module(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.get_submodule(self.decoder_name))

    def attend_by(self, backend: Backend) -> None:
        """Until this is called, attention is what transformers made of the configuration."""
        backend.install(self.decoder_module)
        self._lay_out = backend.lay_out

    def begin_by(self, virtual: AbstractVirtual) -> None:
        """Have every document begin with these places. Raises ModelError."""
        if virtual.attended:
            hand_over(blocks_of(self.decoder_module), self._now)
        self.virtual = virtual

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, target_index: torch.Tensor, *targets: Any, **further: Any
    ) -> torch.Tensor:
        """What the head makes of the hidden states at `target_index`, and of all that follows: with `target_ids` a fp32
        scalar, with `each=True` besides one for every target, [N]; attached to every parameter, without targets too.
        """
        if self.virtual is None:
            hidden = self.decoder_module(**self._lay_out(tokens, positions)).last_hidden_state
        else:
            wide = widen(tokens, positions, self.virtual.num)
            hidden, target_index = self._begun(wide, self.virtual), wide.where[target_index]
        chosen = hidden.reshape(-1, hidden.shape[-1])[target_index]
        return self.get_submodule(self.head_name)(chosen, *targets, **further)

    def _begun(self, wide: Wide, virtual: AbstractVirtual) -> torch.Tensor:
        """Hidden states of all places."""
        called, values = self._lay_out(wide.tokens, wide.positions), virtual.values(wide.tokens.device)
        if virtual.attended:
            self._now[:] = [Attended(values, wide.slots)]
        else:
            embeddings = self.decoder_module.get_input_embeddings()(called.pop("input_ids"))
            flat = embeddings.reshape(-1, embeddings.shape[-1])
            everywhere = values.to(flat.dtype).repeat(len(wide.slots) // virtual.num, 1)
            called["inputs_embeds"] = flat.index_copy(0, wide.slots, everywhere).view(embeddings.shape)
        try:
            hidden: torch.Tensor = self.decoder_module(**called).last_hidden_state
        finally:
            self._now.clear()
        return hidden


def around(model: PreTrainedModel) -> CausalLM:
    """A model that has its weights, called as one that is trained; they are shared. Raises ModelError."""
    head_name, linear = _head_of(model)
    return CausalLM(model, Head(linear, _probe_logits(model, head_name)), head_name).eval()


def build_causal(
    assets: Path,
    *,
    seed: int,
    attention: Attention = "auto",
    loss: Loss = "auto",
    trust_remote_code: bool = False,
    from_scratch: bool = False,
) -> ModelBundle:
    """From a folder with `config.json`, and safetensors unless `from_scratch`. Parameters are fp32 and on meta,
    buffers are real. Where the configuration asks for outputs of its own, these take the vocabulary's place. Raises
    ModelError.
    """
    if has_outputs(assets):
        from dtrain.models._scored import build_scored

        return build_scored(assets, seed=seed, attention=attention, trust_remote_code=trust_remote_code,
                            from_scratch=from_scratch)  # fmt: skip
    model = _on_meta(assets, attention, trust_remote_code=trust_remote_code)
    refuse_what_is_lost(model, assets)
    head_name, linear = _head_of(model)
    logits = _probe_logits(model, head_name)
    blocks = blocks_of(model)
    shapes = {key: param.shape for key, param in model.named_parameters()}
    tied = {key for key, _ in model.named_parameters(remove_duplicate=False)} - set(shapes)
    weights: AbstractWeights
    if from_scratch:
        weights = FreshWeights(copy.deepcopy(model), seed)
    else:
        ignored = [r"rotary_emb\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        names = Names(prefix=model.base_model_prefix, tied=tied, ignored=ignored)
        weights = SafetensorsWeights.open(assets, shapes, names)
    head = Head(linear, logits)
    module = CausalLM(model, head, head_name)
    assert {key for key, _ in module.named_parameters()} == set(shapes), "the wrapper must keep the names"
    module.train()
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, nn.Parameter), type(embedding)
    assert isinstance(linear.weight, nn.Parameter), type(linear.weight)
    return ModelBundle(
        module=module,
        blocks=blocks,
        weights=weights,
        export_name=str,
        assets=assets,
        embedding=embedding,
        head=linear.weight,
        choose_attention=functools.partial(choose, module, type(model), attention),
        choose_loss=functools.partial(choose_loss, head, loss),
    )


def _on_meta(assets: Path, attention: Attention, *, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    # Some layers are made for one implementation, and cannot change it later.
    further = {"attn_implementation": attention} if attention in MASKED else {}
    try:
        config = AutoConfig.from_pretrained(assets, trust_remote_code=trust_remote_code)
        with params_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, **further
            )
    except (ValueError, ImportError, KeyError, OSError) as e:
        raise ModelError(f"{assets}: transformers does not build a causal language model from config.json: {e}") from e


def refuse_what_is_lost(model: PreTrainedModel, assets: Path) -> None:
    """Raise ModelError for a model with state that we do not save, or whose layout transformers changes while loading:
    we read files as they are.
    """
    name = type(model).__name__
    stray = [key for key, _ in model.named_buffers() if key in model.state_dict()]
    if stray:
        raise ModelError(f"{assets}: {name} keeps state outside its parameters ({', '.join(stray[:3])}), which dtrain "
                         f"would not save; use another architecture")  # fmt: skip
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    kinds = (model.config.model_type, type(model).__name__)
    mapping = [rule for kind in kinds for rule in get_checkpoint_conversion_mapping(kind) or ()]
    if any(isinstance(rule, WeightConverter) for rule in mapping):
        raise ModelError(f"{assets}: model_type {kinds[0]!r} stores its weights in another layout than transformers "
                         f"runs them in (mixture of experts), which is not supported; use a dense one")  # fmt: skip


def _head_of(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    head = model.get_output_embeddings()
    name = next((key for key, child in model.named_children() if child is head), None)
    if name is None or not isinstance(head, nn.Linear) or model.base_model is model:
        raise ModelError(
            f"{type(model).__name__}: not a decoder followed by one linear head, which is what dtrain trains"
        )
    return name, head


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers, in order. Raises ModelError."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ModelError(f"{type(model).__name__}: {len(lists)} lists of {count} layers (config num_hidden_layers); "
                         f"one is needed, to know what to shard")  # fmt: skip
    return list(lists[0])


class _FixedDecoder(nn.Module):
    """Stands in for the decoder while the way from hidden states to logits is observed."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


def _probe_logits(model: PreTrainedModel, head_name: str) -> Logits:
    """What this model does to its logits, found among what we know by running the model's own forward on a few
    numbers; raises ModelError for what we do not know.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    factors = [1.0]
    for key in ("logit_scale", "logits_scaling"):
        value = getattr(config, key, None)
        factors += [float(value), 1.0 / float(value)] if value else []
    raw = torch.tensor([[[-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 60.0]]])
    linear = nn.Linear(7, 7, bias=False)
    linear.weight.data.copy_(torch.eye(7))
    probe = copy.copy(model)
    probe._modules = {**model._modules, model.base_model_prefix: _FixedDecoder(raw), head_name: linear}
    try:
        with torch.no_grad():
            seen = probe(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
    except (AttributeError, TypeError, RuntimeError, ValueError) as e:
        raise ModelError(f"{type(model).__name__}: its head needs more than hidden states ({e}); not supported") from e
    for logits in [Logits(scale, c) for c in (cap, None) for scale in factors]:
        if seen.shape == raw.shape and torch.allclose(logits.apply(raw), seen, rtol=1e-5, atol=1e-6):
            return logits
    keys = sorted(k for k in config.to_dict() if "logit" in k or k.startswith(("lm_head", "output_mult")))
    raise ModelError(f"{type(model).__name__} changes its logits in a way dtrain does not know; config keys that look "
                     f"like it: {', '.join(keys) or 'none'}")  # fmt: skip
