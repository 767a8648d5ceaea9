"""From what was typed to a plan: compose, validate, look at the machine, settle the numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.config.compose import choices, compose, group_choice
from dtrain.config.schema import Config
from dtrain.config.spec import AbstractSpec, StrategySpec
from dtrain.config.validate import NOT_HERE, packages, validate, validate_spec
from dtrain.errors import ConfigError, PlanError
from dtrain.plan.machine import Machine, look
from dtrain.plan.plan import Plan, make_plan, settle_device
from dtrain.runs import scrub


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    config: Config
    plan: Plan
    strategies: Mapping[str, StrategySpec]
    """Every choice of the group, with its own defaults."""
    plugins: tuple[str, ...]
    strategy: str
    """The name of the choice, which may be one that chooses among the others."""
    machine: Machine

    def on(self, nodes: int) -> Proposal:
        """The same on so many machines: the global batch stays, its split and what memory decides are made anew.

        Raises PlanError where it cannot be.
        """
        topology = dataclasses.replace(self.plan.topology, nodes=nodes)
        try:
            plan = make_plan(self.config, self.strategy, topology, self.machine, self.strategies)
        except PlanError as error:
            raise PlanError(f"with {_count(nodes)} of launcher.nodes: {error}") from None
        return dataclasses.replace(self, plan=plan)


def configure(overrides: Sequence[str], config_dir: Path | None) -> tuple[Config, str]:
    """The typed configuration, and the name of the chosen strategy. Raises ConfigError with all problems."""
    composed = compose(overrides, config_dir)
    problems = list(composed.problems)
    plugins = _typed_plugins(composed.values, overrides, problems)
    problems += _secrets(composed.values)
    try:
        config = validate(composed.values, plugins=plugins, found=problems)
    except ConfigError as error:
        raise ConfigError.of(_with_origin(str(error).splitlines(), composed.chosen, overrides)) from None
    if problems := _by_choice(config, overrides):
        raise ConfigError.of(problems)
    return config, composed.chosen["strategy"]


def _with_origin(problems: Sequence[str], chosen: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Of a key that an experiment sets and that is none of what is typed beside it: who says so, and how to be rid of
    it.
    """
    typed = {text.lstrip("+~").partition("=")[0] for text in overrides}
    found = []
    for problem in problems:
        key = problem.partition(":")[0]
        whose = NOT_HERE in problem and key not in typed and chosen.get("experiment")
        found.append(f"{problem}; experiment={whose} sets it, ~{key} leaves it out" if whose else problem)
    return found


def _by_choice(config: Config, overrides: Sequence[str]) -> list[str]:
    """Typed keys that would make another choice of the one whose name the run keeps."""
    found = []
    for text in overrides:
        group, _, key = text.lstrip("+~").partition("=")[0].partition(".")
        part = getattr(config, group, None)
        if isinstance(part, AbstractSpec) and key in part.by_choice:
            found.append(f"{text}: the choice says it; type {part.by_choice[key]}")
    return found


def propose(overrides: Sequence[str], config_dir: Path | None, *, elsewhere: bool = False) -> Proposal:
    """What `launch` would do; with `elsewhere` also for GPUs that this machine does not have.

    Raises ConfigError, PlanError, ModelError.
    """
    config, name = configure(overrides, config_dir)
    config = dataclasses.replace(config, template=config.template.settled(), eval=config.eval.settled())
    strategies, left_out = _strategies(config_dir, config.plugins)
    machine = config.launcher.machine(look())
    assumed: list[str] = []
    if elsewhere and config.device == "cuda" and not machine.gpus:
        machine, assumed = _assumed(config, machine)
    topology = config.launcher.topology(settle_device(config, machine), machine)
    plan = make_plan(config, name, topology, machine, strategies)
    plan = dataclasses.replace(plan, notes=(*plan.notes, *assumed, *left_out))
    proposal = Proposal(config, plan, strategies, config.plugins, name, machine)
    least = config.launcher.gathering().least
    if least is None:
        return proposal
    for nodes in range(least, topology.nodes):  # rather now than when a machine leaves
        if misfits := config.strategy.misfits(dataclasses.replace(topology, nodes=nodes), plan.device):
            raise PlanError(f"with {_count(nodes)} of launcher.nodes: {'; '.join(misfits)}")
    few = proposal.on(least).plan
    note = (f"launcher.nodes: {least} to {topology.nodes} machines; with {_count(least)}: {few.batch.describe()}, "
            f"strategy {few.strategy}")  # fmt: skip
    return dataclasses.replace(proposal, plan=dataclasses.replace(plan, notes=(*plan.notes, note)))


def _assumed(config: Config, machine: Machine) -> tuple[Machine, list[str]]:
    """A machine with as many GPUs as are asked for; with one where that is left open, and a note that says so."""
    many, one = (dataclasses.replace(machine, gpus=gpus) for gpus in (1024, 1))
    if config.launcher.topology("cuda", many).procs_per_node != many.gpus:
        return many, []
    return one, ["planned for one GPU; launcher.procs=N is for more"]


def _count(nodes: int) -> str:
    return f"{nodes} machine{'s' * (nodes > 1)}"


def _strategies(config_dir: Path | None, plugins: Sequence[str]) -> tuple[dict[str, StrategySpec], list[str]]:
    """Every choice of the group with its own values; of those that cannot be read, why."""
    found, left_out = {}, []
    for choice in choices(config_dir)["strategy"]:
        try:
            spec = validate_spec("strategy", group_choice("strategy", choice, config_dir), plugins=plugins)
        except ConfigError as error:
            left_out.append(f"strategy={choice} is left out of the table: {error}")
            continue
        assert isinstance(spec, StrategySpec)
        found[choice] = spec
    return found, left_out


def _typed_plugins(values: Mapping[str, Any], overrides: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    """Packages that `_target_` may name: code that runs is allowed by a person, never by a file."""
    named = packages(values.get("plugins"), [])  # what is wrong with the value, `validate` says
    if named and not any(text.lstrip("+").startswith("plugins=") for text in overrides):
        problems.append(f"plugins=[{','.join(named)}]: a file asks for these packages to be imported; type it on the "
                        f"command line to allow that")  # fmt: skip
        return ()
    problems += [f"plugins=[{name}]: no such package; install it, or put its folder into PYTHONPATH"
                 for name in named if name not in sys.modules and importlib.util.find_spec(name) is None]  # fmt: skip
    return named


def _secrets(values: Mapping[str, Any], path: str = "") -> list[str]:
    """Values that hold a token or password: all of them are written to the run folder as they are."""
    found = []
    for key, value in values.items():
        where = f"{path}{key}"
        if isinstance(value, Mapping):
            found += _secrets(value, f"{where}.")
        elif isinstance(value, str | list) and scrub(value) != value:
            found.append(f"{where}: its value holds what looks like a secret, such as one from the environment; every "
                         f"value is written to the run folder. Leave it in the environment")  # fmt: skip
    return found
