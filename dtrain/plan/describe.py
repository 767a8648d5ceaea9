"""A plan in words and one table."""

from __future__ import annotations

import dataclasses
import math

from dtrain.config.schema import Config
from dtrain.plan.memory import Memory
from dtrain.plan.plan import Plan, rates

_COLUMNS = ("params", "grads", "optim", "gathered", "activations", "loss", "other", "total", "host")


def describe(config: Config, plan: Plan) -> str:
    """Everything that the plan settled, for the screen."""
    unit = _Unit.of(plan)
    counted = "by formula, without activations" if plan.figures.blank else "by formula"
    each = "a device has" if plan.device == "cuda" else "a rank's share is"
    lines = [
        *_settled(config, plan),
        "",
        f"memory of a rank in {unit.name}, {counted}, for micro-batches of {plan.batch.micro_batch} "
        f"({each} {plan.capacity_bytes / unit.bytes:,.1f}):",
        *_table(plan, unit),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _settled(config: Config, plan: Plan) -> list[str]:
    f, t, train = plan.figures, plan.topology, config.train
    num_trained = config.tuning.num_trainable(f)
    kept = config.tuning.num_frozen(f)
    trained = f"{num_trained / 1e6:,.1f} M trained ({_name(config.tuning)})" if kept else "all trained"
    about = ", counted as a Llama of these sizes" if f.estimate else ""
    sizes = "a network of your own" if f.blank else f"{f.layers} layers of {f.hidden}, vocabulary {f.vocab:,}"
    packed = "packed" if config.dataset.packing else "one document each"
    steps = (
        f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs, in whole steps once the rows are counted"
    )
    steps += f", {len(train.leave_out)} of them left out" if train.leave_out else ""
    recomputed = ", activations recomputed" if train.activation_checkpointing else ""
    clip = f"gradient norm at most {train.grad_clip:g}" if train.grad_clip else "gradients not clipped"
    dtype = plan.precision if config.export.dtype == "auto" else config.export.dtype
    schedule = f"{_name(config.schedule)} after {config.schedule.warmup_steps} steps of warm-up"
    return [
        f"run        {config.run.name} in {config.run.dir}/{config.run.name}, seed {config.run.seed}",
        f"model      {f.num_params / 1e6:,.1f} M parameters{about}, {trained}; {sizes}",
        f"data       {_dataset(config)}{', streamed' * config.dataset.streaming}: rows of up to {plan.length:,} "
        f"tokens, {packed}; objective {_name(config.objective)}, template {config.template.name}",
        f"ranks      {t.size} on {plan.device}: {t.nodes} node{'s' * (t.nodes > 1)} x {t.procs_per_node}",
        f"strategy   {plan.strategy}, {plan.precision}{recomputed}",
        f"batch      {plan.batch.describe()}",
        f"length     {steps}, each of at most {plan.batch.global_batch * plan.length:,} tokens",
        f"optimizer  {_name(config.optim)}, rate {_rate(plan)}, {schedule}; {clip}",
        f"eval       {_eval(config)}",
        f"saves      {_saves(config, plan.checkpoint_bytes)}",
        f"output     export in {dtype}; trackers {', '.join(config.tracker) or 'none'}",
    ]


def _rate(plan: Plan) -> str:
    return f"{plan.lr:g}" + f" ({rates(plan.other_lrs)})" * bool(plan.other_lrs)


def _dataset(config: Config) -> str:
    parts = config.dataset.parts()
    if parts is None:
        return _name(config.dataset)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in parts.weights.items())
    return f"mixture by tokens of {weights}, on_dry={parts.on_dry}"


def _name(spec: object) -> str:
    return type(spec).__name__.lower()


def _eval(config: Config) -> str:
    told, num = config.eval, len(config.eval.prompts)
    when = f"every {told.every_steps} steps and at the end" if told.every_steps else "at the end"
    most = f", at most {told.max_rows} rows of them" if told.max_rows else ""
    samples = f"up to {told.max_new_tokens} tokens after each of {num} prompts" if num > 1 else \
        f"up to {told.max_new_tokens} tokens after a prompt"  # fmt: skip
    if not told.fraction:
        return f"{when}, {samples}; no rows: eval.fraction=0" if num else "none: eval.fraction=0"
    return f"{when}, on {told.fraction * 100:g} % of the documents, held out{most}" + f"; {samples}" * bool(num)


def _saves(config: Config, num_bytes: int) -> str:
    """When a checkpoint is made, how large each is, and which stay."""
    when = config.checkpoint
    times = [f"every {when.every_steps} steps"] if when.every_steps else []
    times += [f"every {when.every_minutes:g} min"] if when.every_minutes else []
    times += ["at the end"] if when.at_end else []
    stay = [f"the newest {when.keep_last}"]
    stay += [f"each of {when.keep_every} steps"] if when.keep_every else []
    stay += [f"the best by {when.best_by} ({when.best_mode}){_of_evals(config)}"] if when.best_by else []
    size = f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:,.1f} MB"
    return f"{', '.join(times) or 'when asked, or told to stop'}; {size} each; {', '.join(stay)} stay"


def _of_evals(config: Config) -> str:
    """Which checkpoints have what is measured by evals, where some have not."""
    saves, evals = config.checkpoint.every_steps, config.eval.every_steps
    each = math.lcm(saves, evals)
    return f" of those of each {each} steps" if config.checkpoint.best_by != "loss" and each != saves else ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Unit:
    name: str
    bytes: int

    @classmethod
    def of(cls, plan: Plan) -> _Unit:
        """What the largest total is at least 1 of."""
        largest = max(memory.total for memory in plan.memory.values())
        return cls("GiB", 2**30) if largest >= 2**30 else cls("MiB", 2**20)


def _table(plan: Plan, unit: _Unit) -> list[str]:
    """A line for each strategy; columns in which all have nothing are left out."""
    rows = {name: _row(memory) for name, memory in plan.memory.items()}
    shown = [i for i, column in enumerate(_COLUMNS) if column == "total" or any(row[i] for row in rows.values())]
    cells = {name: [f"{row[i] / unit.bytes:,.2f}" for i in shown] for name, row in rows.items()}
    # As narrow as can be: a terminal of 80 columns has room for them all.
    widths = [2 + max(map(len, column)) for column in zip([_COLUMNS[i] for i in shown], *cells.values(), strict=True)]
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{_COLUMNS[i]:>{wide}}" for i, wide in zip(shown, widths, strict=True))]
    for name, found in cells.items():
        mark = "*" if name == plan.strategy else " "
        verdict = "" if plan.memory[name].total <= plan.capacity_bytes else "  does not fit"
        figures = "".join(f"{cell:>{wide}}" for cell, wide in zip(found, widths, strict=True))
        lines.append(f"{mark} {name:<{width - 2}}{figures}{verdict}")
    return lines


def _row(memory: Memory) -> tuple[float, ...]:
    s = memory.states
    return (
        s.params,
        s.grads,
        s.optim,
        s.gathered,
        memory.activations,
        memory.loss,
        memory.constant,
        memory.total,
        s.host,
    )
