"""What stands before every document instead of changing the model: peft's encoders of it, and the folder it is kept in.

The values are peft's own: its encoders make them, and a folder that it loads holds what they have made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from dtrain.errors import ModelError
from dtrain.models._causal import CausalLM
from dtrain.models._meta import params_on_meta
from dtrain.models._weights import seeded
from dtrain.models.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dtrain.models.base import AbstractAdapter, AbstractWeights, ModelBundle
from dtrain.models.virtual import AbstractVirtual

if TYPE_CHECKING:
    from peft import PromptLearningConfig

NAME, KEPT = "prompt_encoder", "prompt_embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    kind: str
    """What a user calls it."""
    config: PromptLearningConfig
    """Of peft, but for what it finds out of the model."""
    init_from: str = ""
    """A folder with an adapter of the same kind to start from, of the encoders that hold what they give."""
    first: Callable[[ModelBundle], torch.Tensor] | None = None
    """What the embedding starts as, where peft's rule is not meant."""


def add(bundle: ModelBundle, what: Prompt, *, seed: int) -> ModelBundle:
    """Have every document begin with places that are trained alone. Raises ModelError."""
    module, kind = bundle.module, f"tuning={what.kind}"
    if not isinstance(module, CausalLM):
        raise ModelError(f"{kind}: {type(module).__name__} is no language model of transformers, and has no documents "
                         f"that something could come before; use tuning=full or freeze")  # fmt: skip
    if bundle.outputs is not None:
        raise ModelError(f"{kind}: this model has outputs of its own in place of a vocabulary, which peft does not "
                         f"keep with it; use tuning=lora")  # fmt: skip
    module.requires_grad_(False)  # noqa: FBT003
    config = completed(what.config, module.decoder_module.config)
    start = _values(bundle, config, what, seed)
    with params_on_meta():
        encoder = _encoder(config)
    module.add_module(NAME, encoder)
    module.begin_by(Encoded(encoder, config))
    weights = _Weights(bundle.weights, start)
    return dataclasses.replace(bundle, weights=weights, adapter=_Adapter(module, config))


def completed(config: PromptLearningConfig, of_model: Any) -> PromptLearningConfig:
    """With what peft finds out of a model's configuration."""
    from peft.utils import _prepare_prompt_learning_config

    config.num_transformer_submodules = 1
    return _prepare_prompt_learning_config(config, of_model.get_text_config())


def begin(module: CausalLM, folder: Path) -> None:
    """Have every document begin with what peft or an export has kept in `folder`. Raises ModelError."""
    from peft import PeftConfig

    module.begin_by(_Fixed(read(folder), PeftConfig.from_pretrained(str(folder))))


def read(folder: Path) -> torch.Tensor:
    """[places, numbers]. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            return torch.as_tensor(file.get_tensor(KEPT)).float()
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: no {KEPT} that peft has written: {error}") from None


def is_prompt(folder: Path) -> bool:
    """Whether the adapter in `folder` is one of these."""
    return num_virtual(folder) > 0


def num_virtual(folder: Path) -> int:
    """How many places come before each document with the adapter in `folder`; 0 for one of another kind."""
    return int(json.loads((folder / ADAPTER_CONFIG).read_text()).get("num_virtual_tokens") or 0)


def _encoder(config: Any) -> nn.Module:
    from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder

    made: nn.Module
    if config.peft_type == "PROMPT_TUNING":
        made = PromptEmbedding(config, None)
    else:
        made = {"P_TUNING": PromptEncoder, "PREFIX_TUNING": PrefixEncoder}[config.peft_type](config)
    return made


def _values(bundle: ModelBundle, config: Any, what: Prompt, seed: int) -> dict[str, torch.Tensor]:
    """What the parameters start as, by their names. Raises ModelError."""
    with seeded(seed, NAME):
        made = {name: param.detach() for name, param in _encoder(config).named_parameters()}
        if what.first is not None:
            made["embedding.weight"] = what.first(bundle)
    if what.init_from:
        try:
            found = read(Path(what.init_from))
        except ModelError as error:
            raise ModelError(f"tuning.init_from={error}") from None
        if found.shape != made["embedding.weight"].shape:
            raise ModelError(f"tuning.init_from={what.init_from}: {tuple(found.shape)} numbers there, "
                             f"{tuple(made['embedding.weight'].shape)} here: another kind of adapter, or of another "
                             f"model")  # fmt: skip
        made["embedding.weight"] = found
    return {f"{NAME}.{name}": value for name, value in made.items()}


class _Shaped(AbstractVirtual):
    def __init__(self, config: Any) -> None:
        self.num, self.attended = int(config.num_virtual_tokens), config.peft_type == "PREFIX_TUNING"
        self._heads, self._layers = config.num_attention_heads, config.num_layers

    def shaped(self, made: torch.Tensor) -> torch.Tensor:
        """As peft divides what its encoder gives."""
        if not self.attended:
            return made
        return made.view(self.num, self._layers, 2, self._heads, -1).permute(1, 2, 0, 3, 4)


@final
class Encoded(_Shaped):
    """What an encoder that is trained gives."""

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        super().__init__(config)
        self._encoder = encoder

    def values(self, device: torch.device) -> torch.Tensor:
        return self.shaped(self._encoder(torch.arange(self.num, device=device)[None])[0])


@final
class _Fixed(_Shaped):
    def __init__(self, kept: torch.Tensor, config: Any) -> None:
        super().__init__(config)
        self._kept = kept

    def values(self, device: torch.device) -> torch.Tensor:
        return self.shaped(self._kept.to(device))


@final
class _Weights(AbstractWeights):
    def __init__(self, base: AbstractWeights, start: Mapping[str, torch.Tensor]) -> None:
        self._base, self._start = base, start

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        if name in self._start:
            return self._start[name].reshape(-1)[start : start + numel]
        return self._base.read(name, start, numel)


@final
class _Adapter(AbstractAdapter):
    pure = True

    def __init__(self, module: CausalLM, config: Any) -> None:
        self._module, self._config = module, config
        said = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
        self.config = said | {"inference_mode": True}
        self.apart = (f"{self.config['peft_type']} stands before the text, and no weight of a model says the same; "
                      f"leave --merge out, and load the model with its adapter")  # fmt: skip

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        virtual, self._module.virtual = self._module.virtual, None
        try:
            yield
        finally:
            self._module.virtual = virtual

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        config = self._config
        width = 2 * config.num_layers if config.peft_type == "PREFIX_TUNING" else 1
        return {KEPT: (config.num_virtual_tokens, width * config.token_dim)}

    def tensors(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        encoder = _encoder(self._config)
        with torch.no_grad():
            for name, param in encoder.named_parameters():
                param.copy_(learned(f"{NAME}.{name}").view(param.shape))
            yield KEPT, encoder(torch.arange(self._config.num_virtual_tokens)[None])[0]

    def merged_shapes(self) -> Mapping[str, tuple[int, ...]]:
        raise AssertionError(self.apart)

    def merged(self, learned: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError(self.apart)
