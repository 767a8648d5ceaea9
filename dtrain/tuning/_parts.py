"""Which parameters of a model a choice of parts means."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from dtrain.errors import ModelError

if TYPE_CHECKING:
    from dtrain.models.base import ModelBundle
    from dtrain.tuning.freeze import Freeze

_SHOWN = 5


def chosen(what: Freeze, bundle: ModelBundle) -> set[str]:
    """Names of the parameters that are trained. Raises ModelError for what matches nothing."""
    named = dict(bundle.module.named_parameters())
    layers, last = bundle.blocks, what.last_layers
    if last > len(layers):
        raise ModelError(f"tuning.last_layers={last}: the model has {len(layers)} layers")
    mine = {id(param) for layer in layers[len(layers) - last :] for param in layer.parameters()}
    if what.norms:
        mine |= {id(param) for module in bundle.module.modules() if "norm" in type(module).__name__.lower()
                 for param in module.parameters(recurse=False)}  # fmt: skip
    for key, asked, param in (("embeddings", what.embeddings, bundle.embedding), ("head", what.head, bundle.head)):
        if asked and param is None:
            raise ModelError(f"tuning.{key}=true: this model says of no parameter that it is that; use tuning.patterns")
        mine |= {id(param)} if asked else set()
    if bundle.outputs is not None:
        mine |= {id(param) for param in bundle.module.get_submodule(bundle.outputs).parameters()}
    return {name for name, param in named.items() if id(param) in mine} | by_pattern(
        "tuning.patterns", what.patterns, list(named)
    )


def by_pattern(key: str, patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """The names that the patterns match. Raises ModelError with every pattern that matches none, and what is near."""
    found: set[str] = set()
    wrong = []
    for pattern in patterns:
        here = fnmatch.filter(names, pattern)
        found.update(here)
        if not here:
            wrong.append(f"{key}={pattern}: matches no parameter of the model; {near(pattern, names)}")
    if wrong:
        raise ModelError("\n".join(wrong))
    return found


def near(pattern: str, names: Sequence[str]) -> str:
    """Names that somebody who wrote this may have meant."""
    word = pattern.strip("*.")
    parts = {name for name in names if word and word.lower() in name.lower()}
    leaves = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    close = sorted(parts)[:_SHOWN] or get_close_matches(word.rpartition(".")[2], leaves, n=_SHOWN, cutoff=0.5)
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(leaves[:20])}"
