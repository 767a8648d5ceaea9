"""From what was typed to a plan: compose, validate, look at the machine, settle the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.config.compose import choices, compose, group_choice
from dtrain.config.schema import Config
from dtrain.config.spec import StrategySpec
from dtrain.config.validate import validate, validate_spec
from dtrain.errors import ConfigError
from dtrain.plan.machine import look
from dtrain.plan.plan import Plan, make_plan, settle_device


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    config: Config
    plan: Plan
    strategies: Mapping[str, StrategySpec]
    """Every choice of the group, with its own defaults."""
    plugins: tuple[str, ...]


def configure(overrides: Sequence[str], config_dir: Path | None) -> tuple[Config, str]:
    """The typed configuration, and the name of the chosen strategy. Raises ConfigError with all problems."""
    composed = compose(overrides, config_dir)
    plugins = _typed_plugins(composed.values, overrides)
    return validate(composed.values, plugins=plugins, found=composed.problems), composed.chosen["strategy"]


def propose(overrides: Sequence[str], config_dir: Path | None, *, elsewhere: bool = False) -> Proposal:
    """What `launch` would do; with `elsewhere` also for GPUs that this machine does not have.

    Raises ConfigError, PlanError, ModelError.
    """
    config, name = configure(overrides, config_dir)
    strategies = {}
    for choice in choices(config_dir)["strategy"]:
        spec = validate_spec("strategy", group_choice("strategy", choice, config_dir), plugins=config.plugins)
        assert isinstance(spec, StrategySpec)
        strategies[choice] = spec
    machine = look()
    if elsewhere and config.device == "cuda" and not machine.gpus:
        machine = dataclasses.replace(machine, gpus=1024)
    topology = config.launcher.topology(settle_device(config, machine), machine)
    plan = make_plan(config, name, topology, machine, strategies)
    return Proposal(config, plan, strategies, config.plugins)


def _typed_plugins(values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[str, ...]:
    """Packages that `_target_` may name: code that runs is allowed by a person, never by a file."""
    named = tuple(str(one) for one in values.get("plugins") or ())
    if named and not any(text.lstrip("+").startswith("plugins=") for text in overrides):
        raise ConfigError(f"plugins=[{','.join(named)}]: a file asks for these packages to be imported; type it on the "
                          f"command line to allow that")  # fmt: skip
    return named
