"""A small model that starts from nothing, with a tokenizer made from the run's own text: trains anywhere in minutes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.config.spec import ModelSpec, spec
from dtrain.folders import whole_folder
from dtrain.models.attention.names import MASKED, Attention, misfits
from dtrain.models.loss import Loss
from dtrain.models.loss import misfits as loss_misfits
from dtrain.plan.figures import Figures

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.world import Device

_SAMPLE_CHARS = 2_000_000
"""Text that the tokenizer is trained on; more makes it slower and hardly better at this size."""
_FORMAT = 2
"""Of the folder that `assets` writes; a change makes older folders unused."""


@spec
class Tiny(ModelSpec):
    """Qwen2's architecture."""

    hidden: int = 320
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 960
    vocab: int = 4096
    """The model has exactly these; the tokenizer has fewer where the text is too short for as many."""
    max_positions: int = 4096
    attention: Attention = "auto"
    """What computes attention; `auto` takes the first that keeps documents apart here."""
    loss: Loss = "auto"
    """What computes the loss of a language model in training: liger, a kernel for CUDA, or dtrain's chunks; `auto` is
    liger where it is installed and gives here what chunks give."""

    def problems(self) -> list[str]:
        found = []
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.intermediate, self.max_positions) < 1:
            found.append("model: every size must be at least 1")
            return found
        if self.hidden % (2 * self.heads):
            found.append(f"model.hidden={self.hidden} is not divisible by 2*heads = {2 * self.heads}: a head must have "
                         f"an even width; nearest: {_multiple(self.hidden, 2 * self.heads)}")  # fmt: skip
        if self.heads % self.kv_heads:
            found.append(
                f"model.heads={self.heads} is not divisible by kv_heads={self.kv_heads}; kv_heads=1 always fits"
            )
        if self.vocab < 260:
            found.append(f"model.vocab={self.vocab} is too small: 256 bytes and 4 special tokens need 260")
        return found

    def trained(self) -> bool:
        return False

    def misfits(self, device: Device) -> list[str]:
        return [*misfits(self.attention, device), *loss_misfits(self.loss, device)]

    def masks(self) -> bool:
        return self.attention in MASKED

    def figures(self) -> Figures:
        return Figures.from_hf(self._config())

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        from dtrain.models._tokenizer import sample_texts, train_tokenizer

        sample = sample_texts(texts(), _SAMPLE_CHARS)
        folder = cache / f"tiny-{self._digest(sample)}"
        if folder.is_dir():
            return folder
        with whole_folder(folder) as making:
            train_tokenizer(sample, self.vocab, making, self.max_positions)
            _write(making / "config.json", self._config())
            _write(making / "generation_config.json", {"eos_token_id": [0, 2], "pad_token_id": 3, "do_sample": False})
        return folder

    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        from dtrain.models._causal import build_causal

        return build_causal(assets, seed=seed, attention=self.attention, loss=self.loss, from_scratch=True)

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 3,
            "torch_dtype": "float32",
        }

    def _digest(self, sample: list[str]) -> str:
        made_of = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("attention", "loss")}
        digest = hashlib.sha256(json.dumps([_FORMAT, made_of]).encode())
        for text in sample:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()[:16]


def _multiple(value: int, of: int) -> str:
    low = value // of * of
    return " or ".join(str(n) for n in (low, low + of) if n > 0)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
