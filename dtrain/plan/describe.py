"""A plan in words and one table."""

from __future__ import annotations

from dtrain.config.schema import Config
from dtrain.plan.memory import Memory
from dtrain.plan.plan import Plan

_COLUMNS = ("params", "grads", "optim", "gathered", "activations", "loss", "other", "total", "host")


def describe(config: Config, plan: Plan) -> str:
    """Everything that the plan settled, for the screen."""
    f, t = plan.figures, plan.topology
    steps = f"{config.train.steps} steps" if config.train.steps else f"{config.train.epochs:g} epochs, in steps once the rows are counted"
    recomputed = ", activations recomputed" if config.train.activation_checkpointing else ""
    lines = [
        f"run        {config.run.name} in {config.run.dir}/{config.run.name}",
        f"model      {f.num_params / 1e6:,.1f} M parameters, {f.layers} layers of {f.hidden}, vocabulary {f.vocab:,}",
        f"ranks      {t.size} on {plan.device}: {t.nodes} node{'s' * (t.nodes > 1)} x {t.procs_per_node}",
        f"strategy   {plan.strategy}, {plan.precision}{recomputed}",
        f"batch      {plan.batch.describe()}; rows of up to {plan.length} tokens",
        f"length     {steps}; {plan.batch.global_batch * plan.length:,} tokens a step at most",
        "",
        f"memory of a rank in GiB, by formula, for a micro-batch of {plan.batch.micro_batch} (a device has "
        f"{plan.capacity_bytes / 2**30:.1f}):",
        *_table(plan),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def summary(config: Config, plan: Plan, steps: int) -> list[str]:
    """What runs, in two lines, for the trackers."""
    f = plan.figures
    return [
        f"{f.num_params / 1e6:,.1f} M parameters, {plan.strategy} on {plan.topology.size} {plan.device} ranks, {plan.precision}",
        f"{plan.batch.describe()}; {steps} steps",
    ]


def _table(plan: Plan) -> list[str]:
    width = max(len(name) for name in plan.memory) + 2
    head = " " * width + "".join(f"{column:>12}" for column in _COLUMNS)
    lines = [head]
    for name, memory in plan.memory.items():
        mark = "*" if name == plan.strategy else " "
        verdict = "" if memory.total <= plan.capacity_bytes else "  does not fit"
        lines.append(f"{mark} {name:<{width - 2}}" + "".join(f"{value / 2**30:>12.3f}" for value in _row(memory)) + verdict)
    return lines


def _row(memory: Memory) -> tuple[float, ...]:
    s = memory.states
    return (s.params, s.grads, s.optim, s.gathered, memory.activations, memory.loss, memory.constant, memory.total, s.host)
