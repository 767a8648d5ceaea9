"""Frozen values to settled numbers. Every number that a run needs is worked out here, once, and read afterwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from dtrain.config.compose import nearest
from dtrain.config.schema import Config
from dtrain.config.spec import ObjectiveSpec, StrategySpec
from dtrain.errors import DataError, PlanError
from dtrain.plan.batch import BatchPlan
from dtrain.plan.figures import Figures
from dtrain.plan.machine import Machine
from dtrain.plan.memory import Memory, Need, Shape, estimate
from dtrain.plan.world import Device, Topology

UNKNOWN_GPU_BYTES = 80 * 2**30
_WITHOUT_BF16 = ("V100", "T4", "P100", "RTX 20", "Quadro RTX")
"""GPUs made before bf16."""
AUTO_BATCH = 16
MICRO_BATCH_CAP = {"cpu": 8, "cuda": 64}
"""Beyond this a larger forward is no faster; `auto` goes no higher."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    topology: Topology
    device: Device
    precision: Literal["fp32", "bf16", "fp16"]
    strategy: str
    """Name of the choice in `conf/strategy`."""
    figures: Figures
    batch: BatchPlan
    lr: float
    other_lrs: Mapping[str, float]
    """Where the objective follows from the rows, and they have not been looked at: those with another rate, by name."""
    length: int
    """Most tokens of one row."""
    memory: Mapping[str, Memory]
    """Per rank, by strategy: the chosen one and those it was chosen from."""
    capacity_bytes: int
    """Memory of one device; of a rank's share of the machine on CPU."""
    checkpoint_bytes: int
    """Of one checkpoint: fp32 masters and optimizer state of what is trained."""
    notes: tuple[str, ...]
    """What was decided for the user, and why."""

    @property
    def fits(self) -> bool:
        return self.memory[self.strategy].total <= self.capacity_bytes


def settle_device(config: Config, machine: Machine) -> Device:
    """Where ranks compute. Raises PlanError."""
    if config.device == "auto":
        return "cuda" if machine.gpus else "cpu"
    return config.device


def make_plan(config: Config, name: str, topology: Topology, machine: Machine,
              strategies: Mapping[str, StrategySpec]) -> Plan:  # fmt: skip
    """Everything `launch` decides before it looks at the data. Raises PlanError with all that is wrong.

    `name` is the chosen strategy's; `strategies` are all choices, of which `auto` picks and the table compares.
    """
    notes: list[str] = []
    device = settle_device(config, machine)
    figures = config.model.figures()
    precision = _precision(config, device, machine, notes)
    problems = [*_check_length(config, figures), *_check_blank(config, figures), *_check_precision(config, device),
                *_check_tokens(config), *check_best(config, config.objective),
                *_check_epochs(config), *config.strategy.misfits(topology, device),
                *config.model.misfits(device)]  # fmt: skip
    if not config.strategy.candidates():
        problems += _misfits(config, config.strategy, precision, device)
    if problems:
        raise PlanError.of(problems)
    global_batch = _global_batch(config)
    capacity, known = _capacity(config, device, machine, topology)
    if not known:
        notes.append("no GPU is visible here: planned for one of 80 GiB; set device_memory_gb for another")
    if config.train.steps is not None and config.schedule.warmup_steps >= config.train.steps:
        notes.append(
            f"schedule.warmup_steps={config.schedule.warmup_steps}: all {config.train.steps} steps are warm-up"
        )
    tuning = config.tuning
    state_bytes = config.optim.state_bytes + tuning.state_bytes
    saved_bytes = 4 + 4 * len(config.optim.state_names) + tuning.state_bytes
    need = Need(figures, tuning.num_trainable(figures), precision, state_bytes, topology,
                tuning.frozen_bytes(figures, 4 if precision == "fp32" else 2), tuning.divides())  # fmt: skip
    if virtual := tuning.num_virtual():
        packed = "of a packed row too; the table below counts one document a row" * config.dataset.packing
        notes.append(f"tuning.num_virtual_tokens={virtual}: that many places come before every document, beside the "
                     f"{config.dataset.max_length} tokens of a row{', ' * bool(packed)}{packed}")  # fmt: skip
    room = _Room(config, need, device, capacity, global_batch)
    concrete = {key: one for key, one in strategies.items()
                if not one.candidates() and not one.misfits(topology, device)
                and not _misfits(config, one, precision, device)}  # fmt: skip
    if not config.strategy.candidates():
        concrete[name] = config.strategy
    chosen, micro = _choose(config, name, concrete, room, notes)
    if tuning.keeps() and not config.model.trained():
        notes.append(f"tuning={type(tuning).__name__.lower()}: what it leaves as it is was never trained; model.path="
                     f"FOLDER, or a preset such as model=qwen0_5b_instruct, comes trained")  # fmt: skip
    if figures.blank:
        notes.append(_uncounted(config, micro))
    if (why := concrete[chosen].unsavable()) is not None:
        notes.append(f"{why}, so that nothing is saved; a run that ends early starts from the first step")
    memory = {key: room.memory(one, micro) for key, one in concrete.items()}
    lr, other_lrs, line = _lr(config)
    notes += [line] if line else []
    return Plan(
        topology, device, precision, chosen, figures, BatchPlan(global_batch, micro, topology.size), lr, other_lrs,
        config.dataset.max_length, memory, capacity, saved_bytes * need.num_trainable, tuple(notes),
    )  # fmt: skip


def _misfits(config: Config, strategy: StrategySpec, precision: str, device: Device) -> list[str]:
    return [*config.tuning.misfits(strategy, precision, device), *config.optim.misfits(strategy, device)]


def num_steps(config: Config, global_batch: int, num_rows: int | None) -> int:
    """Optimizer steps of the whole run, once the rows are counted: whole steps, so that the last one may go a little
    into the next epoch.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    assert num_rows is not None, "rows are counted where epochs are asked for"
    return max(1, math.ceil(config.train.epochs * num_rows / global_batch))


@dataclasses.dataclass(frozen=True, slots=True)
class _Room:
    """How much a strategy leaves for micro-batches."""

    config: Config
    need: Need
    device: Device
    capacity: int
    global_batch: int

    def memory(self, strategy: StrategySpec, micro_batch: int) -> Memory:
        config = self.config
        length = config.dataset.max_length + config.tuning.num_virtual()
        shape = Shape(micro_batch, length, config.train.activation_checkpointing, self.device,
                      masks=config.model.masks())  # fmt: skip
        return estimate(self.need, strategy.states(self.need), shape)

    def micro_batch(self, strategy: StrategySpec) -> int | None:
        """The micro-batch to use, or None where not even the asked one, or one of 1, fits."""
        asked = self.config.batch.micro_batch
        share = -(-self.global_batch // self.need.topology.size)
        if asked != "auto":
            return asked if self._fits(strategy, min(asked, share)) else None
        most = min(share, MICRO_BATCH_CAP[self.device])
        best = next((micro for micro in range(most, 0, -1) if self._fits(strategy, micro)), None)
        # The same number of forwards with evenly filled ones.
        return best and -(-share // -(-share // best))

    def _fits(self, strategy: StrategySpec, micro_batch: int) -> bool:
        return self.memory(strategy, micro_batch).total <= self.capacity


def _choose(config: Config, name: str, concrete: Mapping[str, StrategySpec], room: _Room,
            notes: list[str]) -> tuple[str, int]:  # fmt: skip
    """The strategy and the micro-batch."""
    asked = config.batch.micro_batch
    least = 1 if asked == "auto" else asked
    if not config.strategy.candidates():
        micro = room.micro_batch(config.strategy)
        if micro is None:
            micro = least
            needed = room.memory(config.strategy, micro).total
            notes.append(f"does not fit by the formula: {needed / 2**30:.1f} GiB a rank of {room.capacity / 2**30:.1f}"
                         f"; it may run out of memory")  # fmt: skip
        return name, micro
    tried: list[str] = []
    for key in config.strategy.candidates():
        if key not in concrete:
            raise PlanError(f"strategy.order={key}: no such strategy; there are: {', '.join(sorted(concrete))}")
        micro = room.micro_batch(concrete[key])
        if micro is not None:
            before = (
                f"; with a micro-batch of {least} {', '.join(tried)} of {room.capacity / 2**30:.1f}" if tried else ""
            )
            notes.append(f"strategy={name} takes {key}: the first of {', '.join(config.strategy.candidates())} that "
                         f"fits{before}")  # fmt: skip
            return key, micro
        tried.append(f"{key} needs {room.memory(concrete[key], least).total / 2**30:.1f} GiB")
    raise PlanError(f"strategy={name}: none fits {room.capacity / 2**30:.1f} GiB a rank with a micro-batch of {least}: "
                    f"{'; '.join(tried)}; use more ranks, train.activation_checkpointing=true, a shorter "
                    f"dataset.max_length, or name a strategy with offload")  # fmt: skip


def _uncounted(config: Config, micro: int) -> str:
    """Of a network of which no more is known than its parameters: what of its memory is not in the plan."""
    line = ("activations are not counted, as of a network of your own they are known only once it runs; what fits is "
            "told by parameters, gradients and optimizer state alone")  # fmt: skip
    if config.batch.micro_batch != "auto":
        return f"{line}; `dtrain rehearse` tries batch.micro_batch={config.batch.micro_batch}"
    return (f"{line}, and batch.micro_batch=auto takes {micro} by them; where memory runs out, set batch.micro_batch=N "
            f"or train.on_oom=smaller_micro_batch")  # fmt: skip


def _check_blank(config: Config, figures: Figures) -> list[str]:
    if not figures.blank or not config.tuning.keeps():
        return []
    name = type(config.tuning).__name__.lower()
    return [f"tuning={name}: of a network of your own no more is known than its parameters; use tuning=full"]


def _check_length(config: Config, figures: Figures) -> list[str]:
    virtual = config.tuning.num_virtual()
    if config.dataset.max_length + virtual <= figures.max_positions:
        return []
    if config.dataset.max_length <= figures.max_positions:
        return [f"dataset.max_length={config.dataset.max_length}: with tuning.num_virtual_tokens={virtual} before it "
                f"more than the {figures.max_positions} positions that the model was made for; set it to at most "
                f"{figures.max_positions - virtual}"]  # fmt: skip
    return [f"dataset.max_length={config.dataset.max_length}: the model was made for {figures.max_positions} positions"
            f"; set it to at most that"]  # fmt: skip


def _check_precision(config: Config, device: Device) -> list[str]:
    if config.train.precision == "fp16" and device != "cuda":
        return ["train.precision=fp16: loss scaling needs CUDA; use bf16 or fp32 on cpu"]
    return []


def _check_epochs(config: Config) -> list[str]:
    if not config.dataset.streaming or config.train.epochs is None:
        return []
    return [f"train.epochs={config.train.epochs:g}: of a stream nobody has counted the rows; set train.steps=N "
            f"train.epochs=null, or dataset.streaming=false"]  # fmt: skip


def _check_tokens(config: Config) -> list[str]:
    tokens, length = config.batch.global_tokens, config.dataset.max_length
    if tokens is None:
        return []
    if not config.dataset.packing:
        return [f"batch.global_tokens={tokens}: only packed rows have a fixed number of tokens; set "
                f"dataset.packing=true, or batch.global_batch"]  # fmt: skip
    if tokens % length:
        near = [n for n in (tokens // length * length, (tokens // length + 1) * length) if n]
        return [f"batch.global_tokens={tokens}: not a multiple of dataset.max_length={length}; nearest: "
                f"{' or '.join(map(str, near))}"]  # fmt: skip
    return []


def check_best(config: Config, objective: ObjectiveSpec) -> list[str]:
    """Whether checkpoints can be compared by what `checkpoint.best_by` names."""
    name, saves, evals = config.checkpoint.best_by, config.checkpoint.every_steps, config.eval.every_steps
    if name in (None, "loss"):
        return []
    measured = ["loss", "eval_loss", *dict.fromkeys(one for spec in (objective, *objective.candidates())
                                                  for one in spec.measured)]  # fmt: skip
    said = f"checkpoint.best_by={name}"
    if name not in measured:
        return [f"{said}: nothing that this run measures{nearest(name, measured)}; there are {', '.join(measured)}"]
    if not config.eval.fraction:
        return [f"{said}: is measured on held-out rows, and eval.fraction=0 leaves none; hold some out, or take loss"]
    if not saves or not evals:
        return [f"{said}: is known of checkpoints at steps with an eval, and checkpoint.every_steps={saves} with "
                f"eval.every_steps={evals} makes none before the end; set both, as to the same number"]  # fmt: skip
    return []


def _precision(config: Config, device: Device, machine: Machine,
               notes: list[str]) -> Literal["fp32", "bf16", "fp16"]:  # fmt: skip
    if config.train.precision != "auto":
        return config.train.precision
    settled: Literal["fp32", "bf16", "fp16"] = "bf16" if device == "cuda" else "fp32"
    if device == "cuda" and any(name in machine.gpu_name for name in _WITHOUT_BF16):
        settled = "fp16"
    notes.append(f"train.precision=auto takes {settled} on {machine.gpu_name if settled == 'fp16' else device}")
    return settled


def lr_of(config: Config, objective: ObjectiveSpec) -> tuple[float, str]:
    """The learning rate, and where it was left open a line about it; `objective` is the one that is chosen."""
    if config.optim.lr != "auto":
        return config.optim.lr, ""
    trained = config.model.trained()
    lr = config.optim.tuning_lr if trained else config.optim.fresh_lr
    line = f"the weights {'come trained' if trained else 'are fresh'}"
    for one in (config.tuning, objective) if trained else (config.tuning,):
        if one.lr_scale != 1.0:
            lr *= one.lr_scale
            line += f", times {one.lr_scale:g} for {one.group}={type(one).__name__.lower()}"
    lr = float(f"{lr:g}")  # as it is told, without what multiplying adds in the last digit
    return lr, f"optim.lr=auto takes {lr:g}: {line}"


def _lr(config: Config) -> tuple[float, dict[str, float], str]:
    """The learning rate; those of objectives with another one that the rows may still call for; and a line about it."""
    left = _objectives(config)
    if len(left) == 1:
        lr, line = lr_of(config, left[0])
        return lr, {}, line
    lr, line = lr_of(config, config.objective)
    each = {type(one).__name__.lower(): lr_of(config, one)[0] for one in left}
    others = {name: other for name, other in each.items() if other != lr}
    if others:
        name = type(config.objective).__name__.lower()
        line += f"; {rates(others)}, if the rows call for that (objective={name})"
    return lr, others, line


def rates(lrs: Mapping[str, float]) -> str:
    """`1e-06 for dpo, kto`: learning rates by objective, in words."""
    return "; ".join(f"{lr:g} for {', '.join(name for name in lrs if lrs[name] == lr)}"
                     for lr in dict.fromkeys(lrs.values()))  # fmt: skip


def _objectives(config: Config) -> list[ObjectiveSpec]:
    """Those that it may come to, as far as can be told without reading the data."""
    found = config.objective.candidates()
    try:
        known = [config.objective.resolve(shape) for shape in config.dataset.shapes()]
    except DataError:  # which is told when the rows are read
        known = []
    return list({type(one): one for one in known or found}.values()) or [config.objective]


def _global_batch(config: Config) -> int:
    if config.batch.global_tokens is not None:
        return config.batch.global_tokens // config.dataset.max_length
    asked = config.batch.global_batch
    assert asked is not None
    return AUTO_BATCH if asked == "auto" else asked


def _capacity(config: Config, device: Device, machine: Machine, topology: Topology) -> tuple[int, bool]:
    """Bytes a rank may use, and whether they are known rather than assumed."""
    if config.device_memory_gb is not None:
        return int(config.device_memory_gb * 2**30), True
    if device == "cpu":
        return machine.memory_bytes // topology.procs_per_node, True
    return (machine.gpu_memory_bytes, True) if machine.gpu_memory_bytes else (UNKNOWN_GPU_BYTES, False)
