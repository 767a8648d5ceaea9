"""A model with its tokenizer, whole on one device, as `generate`, `chat` and `eval` use it."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtrain.data.tokenizer import TextTokenizer, stop_ids
from dtrain.errors import ModelError
from dtrain.models.assets import ADAPTER_CONFIG
from dtrain.models.base import DTYPES
from dtrain.models.outputs import has_outputs

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    folder: Path
    model: Any
    """Of transformers, or peft's around one; nothing in it is trained. None for a model with outputs of its own in
    place of a vocabulary."""
    tokenizer: TextTokenizer
    stops: frozenset[int]
    """Tokens at which it stops: what its files say, and what ends a turn of its chat template."""
    max_positions: int | None
    device: torch.device
    dtype: str
    num_virtual: int = 0
    """Places that an adapter puts before a prompt; not of `max_positions`."""

    def scored(self) -> nn.Module:
        """The same weights called as in training: without logits, giving the sum of the cross-entropy over targets, or
        the log-probability of each. Raises ModelError.
        """
        from dtrain.models._causal import around
        from dtrain.tuning._prompts import begin, is_prompt

        if self.model is None:
            return self._with_outputs()
        if not hasattr(self.model, "get_base_model"):
            return around(self.model)
        assert is_prompt(self.folder), "any other adapter was worked into its model"
        module = around(self.model.get_base_model())
        begin(module, self.folder)
        return module

    def _with_outputs(self) -> nn.Module:
        from dtrain.models._causal import build_causal

        return whole(build_causal(self.folder, seed=0), self.device, DTYPES[self.dtype])


def whole(bundle: ModelBundle, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """All of a model that was built without weights, on one device; it is only looked at."""
    from dtrain.strategies.shared import materialise

    materialise(bundle.module, device, dtype)
    with torch.no_grad():
        for name, param in bundle.module.named_parameters():
            param.copy_(bundle.weights.read(name, 0, param.numel()).view(param.shape))
    return bundle.module.requires_grad_(requires_grad=False).eval()


def load(folder: Path, base: Path | None, *, dtype: str, writes: bool) -> Loaded:
    """`folder`: of a model, or of an adapter, which `base` then is the model of. `writes`: it is to give text;
    otherwise an adapter is worked into its model, in fp32, before that becomes `dtype`. `dtype`: auto, fp32, bf16 or
    fp16. Raises ModelError, DataError.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as library

    from dtrain.tuning._prompts import num_virtual

    library.set_verbosity_error()
    library.disable_progress_bar()
    tokenizer = TextTokenizer.load(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    if base is None and has_outputs(folder):
        if writes:
            raise ModelError(f"{folder}: the model has outputs of its own in place of a vocabulary, so it writes "
                             f"nothing; transformers' AutoModelForSequenceClassification loads it, and `dtrain eval` "
                             f"measures it")  # fmt: skip
        return Loaded(folder, None, tokenizer, frozenset(), None, device, dtype)
    kind = torch.float32 if base is not None and not writes else DTYPES[dtype]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base or folder, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{base or folder}: transformers does not load it: {error}") from error
    stops = stops_of(model.config.get_text_config(), tokenizer, [folder] if base is None else [base, folder])
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # What a model's files say of sampling is not asked for: what is typed is all there is.
    model.generation_config = GenerationConfig()
    if base is not None:
        model = _with_adapter(model, folder, merged=not writes)
    model.to(device=device, dtype=DTYPES[dtype]).eval().requires_grad_(requires_grad=False)
    virtual = 0 if base is None else num_virtual(folder)
    if max_positions is not None:
        max_positions -= virtual
    return Loaded(folder, model, tokenizer, stops, max_positions, device, dtype, virtual)


def _with_adapter(model: Any, folder: Path, *, merged: bool) -> Any:
    from dtrain.tuning._peft import load as load_adapter
    from dtrain.tuning._prompts import is_prompt

    if "score" in (json.loads((folder / ADAPTER_CONFIG).read_text()).get("modules_to_save") or []):
        raise ModelError(f"{folder}: an adapter of a model with outputs of its own in place of a vocabulary; `dtrain "
                         f"export RUN --merge --to DIR` makes a whole model, which `dtrain eval` measures")  # fmt: skip
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nothing here asks for
    tuned: Any = load_adapter(model, folder)
    if merged and not is_prompt(folder):
        try:
            return tuned.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ModelError(f"{folder}: an adapter that cannot be worked into its model: {error}") from error
    tuned.generation_config = model.generation_config
    return tuned


def stops_of(config: Any, tokenizer: TextTokenizer, folders: list[Path]) -> frozenset[int]:
    """Tokens at which a model stops, of its decoder's configuration of transformers and its folders."""
    said = config.eos_token_id
    found: list[int | None] = [*([said] if isinstance(said, int) else said or [])]
    found += [tokenizer.token_id("eos_token"), *(one for folder in folders for one in stop_ids(folder))]
    found += [tokenizer.token_id(token) for token in tokenizer.ends_of_turns()]
    return frozenset(one for one in found if one is not None)
