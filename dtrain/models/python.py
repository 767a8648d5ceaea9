"""A network that a function of yours makes, for an objective that knows what to call it with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dtrain.config import named
from dtrain.config.spec import ModelSpec, spec
from dtrain.folders import whole_folder
from dtrain.plan.figures import Figures

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle


@spec
class Python(ModelSpec):
    """Its weights start fresh, by the rules of its modules; rows are still made with a tokenizer, one of no words."""

    function: str
    """`module:function` of a package that `plugins=[...]` allows. It makes a `torch.nn.Module`, whose modules each draw
    fresh values for their own parameters by `reset_parameters()`, as torch's do."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What it is called with, by name."""

    def problems(self) -> list[str]:
        return named.problems("model.function", self.function, "my_package.net:make")

    def packages(self) -> Mapping[str, str]:
        return named.packages("model.function", self.function)

    def trained(self) -> bool:
        return False

    def figures(self) -> Figures:
        from dtrain.models._network import network, units

        module = network(self.function, self.args)
        each = [sum(param.numel() for param in unit.parameters()) for unit in units(module)]
        return Figures(
            hidden=1, layers=max(1, len(each)), heads=1, kv_heads=1, head_dim=1, intermediate=1, vocab=1, tied=False,
            max_positions=sys.maxsize, num_params=sum(param.numel() for param in module.parameters()),
            num_block_params=max(each, default=0), blank=True,
        )  # fmt: skip

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        from tokenizers import Tokenizer, models

        said = json.dumps({"function": self.function, "args": self.args}, sort_keys=True)
        folder = cache / f"network-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        if not folder.is_dir():
            with whole_folder(folder) as making:
                Tokenizer(models.WordLevel({"": 0}, unk_token="")).save(str(making / "tokenizer.json"))
                (making / "tokenizer_config.json").write_text("{}\n")
                (making / "config.json").write_text(said + "\n")
        return folder

    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        from dtrain.models._network import bundle

        return bundle(self.function, self.args, assets, seed=seed)
