"""A causal language model in the format of transformers: a folder, or a repository of a hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtrain.config.spec import ModelSpec, spec
from dtrain.errors import ModelError
from dtrain.models.attention.names import MASKED, Attention, misfits
from dtrain.models.loss import Loss
from dtrain.models.loss import misfits as loss_misfits
from dtrain.plan.figures import Figures

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.plan.world import Device


@spec
class HF(ModelSpec):
    path: str = ""
    """A folder, or a repository as `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for code that you have read."""
    from_scratch: bool = False
    """Fresh weights, by the model's own rules, in place of the stored ones."""
    pad_token: str | None = None
    """For a tokenizer that has none: a token of its vocabulary that no text contains."""
    attention: Attention = "auto"
    """What computes attention; `auto` takes the first that keeps documents apart here."""
    loss: Loss = "auto"
    """What computes the loss of a language model in training: liger, a kernel for CUDA, or dtrain's chunks; `auto` is
    liger where it is installed and gives here what chunks give."""
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of the model's config.json that its size depends on, so that a plan needs no download."""

    def problems(self) -> list[str]:
        if not self.path.strip():
            return ["model.path is needed with model=hf: a folder with config.json, or a repository such as "
                    "model.path=Qwen/Qwen2.5-7B"]  # fmt: skip
        return []

    def trained(self) -> bool:
        return not self.from_scratch

    def misfits(self, device: Device) -> list[str]:
        return [*misfits(self.attention, device), *loss_misfits(self.loss, device)]

    def masks(self) -> bool:
        return self.attention in MASKED

    def figures(self) -> Figures:
        from dtrain.models._hub import is_repository, local_config, missing

        # A folder says itself what it is: a preset may have been pointed at another model.
        config = local_config(self.path, self.revision, folders_only=bool(self.architecture)) or self.architecture
        if not config and not is_repository(self.path):
            raise ModelError(missing(self.path))
        if not config:
            raise ModelError(f"model.path={self.path!r}: its config.json is not on this machine, so its size is not "
                             f"known; fetch it with `hf download {self.path} config.json`, or give the keys as "
                             f"model.architecture")  # fmt: skip
        return Figures.from_hf(config)

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        from dtrain.models._hub import fetch, read_config
        from dtrain.models._overlay import with_tokenizer

        folder = fetch(self.path, self.revision, self.hub, weights=not self.from_scratch, code=self.trust_remote_code)
        if self.architecture:
            self._compare(Figures.from_hf(read_config(folder)), folder)
        return with_tokenizer(folder, self.pad_token, cache)

    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        from dtrain.models._causal import build_causal

        return build_causal(
            assets,
            seed=seed,
            attention=self.attention,
            loss=self.loss,
            trust_remote_code=self.trust_remote_code,
            from_scratch=self.from_scratch,
        )

    def _compare(self, found: Figures, folder: Path) -> None:
        """Raise ModelError where the plan was made for another model than the folder has."""
        planned = dataclasses.asdict(self.figures())
        other = [
            f"{key} {planned[key]} planned, {value} found"
            for key, value in dataclasses.asdict(found).items()
            if key != "max_positions" and value != planned[key]
        ]
        if other:
            raise ModelError(f"model.architecture does not describe model.path={self.path!r} ({folder}): "
                             f"{'; '.join(other)}; use model=hf with this path")  # fmt: skip
