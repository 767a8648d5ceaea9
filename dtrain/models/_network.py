"""A network of the user's: on meta, in units, with fresh values by the rules of its modules."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.config import named
from dtrain.errors import ModelError
from dtrain.models._meta import params_on_meta
from dtrain.models._weights import FreshWeights, seeded
from dtrain.models.base import ModelBundle

_RULES = ("reset_parameters", "_reset_parameters")
"""What torch's own modules call it."""


def network(function: str, args: Mapping[str, Any]) -> nn.Module:
    """What the function makes, with parameters on meta. Raises ModelError."""
    make = named.find("model.function", function, ModelError)
    try:
        with seeded(0, function), params_on_meta():
            module = make(**args)
    except Exception as error:  # what a user's function raises is its own affair
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"model.function={function}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})"
        ) from error
    if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
        what = type(module).__name__
        raise ModelError(f"model.function={function}: gave {what} instead of a torch.nn.Module with parameters")
    problems = [f"model.function={function}: {why}" for why in _unfit(module)]
    if problems:
        raise ModelError.of(problems)
    return module


def _unfit(module: nn.Module) -> list[str]:
    stray = [key for key, _ in module.named_buffers() if key in module.state_dict()]
    found = []
    if stray:
        found.append(f"keeps state outside its parameters ({', '.join(stray[:3])}), which dtrain would not save; "
                     f"register it with persistent=False if it never changes, or use a layer without")  # fmt: skip
    for name, one in module.named_modules():
        if any(True for _ in one.parameters(recurse=False)) and not any(hasattr(one, rule) for rule in _RULES):
            found.append(f"{name or 'the module itself'} ({type(one).__name__}) has parameters and no "
                         f"reset_parameters(), which draws fresh values for them; give it one")  # fmt: skip
    return found


def units(module: nn.Module) -> list[nn.Module]:
    """What is divided and recomputed as one: the modules that it calls, those of lists and sequences one by one."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += units(child)
        elif any(True for _ in child.parameters()) and child not in found:
            found.append(child)
    return found


def bundle(function: str, args: Mapping[str, Any], assets: Path, *, seed: int) -> ModelBundle:
    """Raises ModelError."""
    module = network(function, args).float().train()
    weights = FreshWeights(copy.deepcopy(module), seed, by=_by_its_rules)
    module.register_forward_pre_hook(_as_its_weights, with_kwargs=True)
    return ModelBundle(module, units(module), weights, str, assets)


def _by_its_rules(chain: Sequence[nn.Module]) -> None:
    for holder in chain:
        rule = next((getattr(holder, name) for name in _RULES if hasattr(holder, name)), None)
        if rule is not None:
            rule()


def _as_its_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Fractions in the precision of forward and backward, whatever the strategy."""
    dtype = next(module.parameters()).dtype
    cast = {key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in kwargs.items()}  # fmt: skip
    return args, cast
