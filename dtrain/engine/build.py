"""From frozen values to live things: model, tuning, strategy, objective, in the order in which it must be done."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain.checkpoint.export import Adapter, with_frozen, write_export
from dtrain.checkpoint.manifest import Manifest, Parameter
from dtrain.checkpoint.restore import restore
from dtrain.checkpoint.storage import WEIGHT, file_name
from dtrain.checkpoint.tuned import base_of, compared_with
from dtrain.config import frozen
from dtrain.data.collate import collate
from dtrain.data.streaming import BLOB, merged
from dtrain.engine import rng
from dtrain.engine.around import around
from dtrain.engine.engine import Course, Engine
from dtrain.engine.proof import Proof
from dtrain.engine.replicas import Replicas
from dtrain.engine.samples import Sampler
from dtrain.engine.state import State
from dtrain.models.assets import files_digest
from dtrain.models.base import DTYPES, AbstractWeights, Attention, LossKernel, Setting
from dtrain.plan.batch import BatchPlan
from dtrain.plan.machine import peak_flops
from dtrain.runs.folder import utc
from dtrain.strategies.base import AbstractStrategy, Optim

if TYPE_CHECKING:
    from dtrain.checkpoint.restore import Restored
    from dtrain.comm import AbstractComm
    from dtrain.config.schema import Config
    from dtrain.data.store import AbstractStore
    from dtrain.data.streaming import Streams
    from dtrain.models.base import ModelBundle
    from dtrain.objectives.base import Before
    from dtrain.plan.world import World


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    engine: Engine
    strategy: AbstractStrategy
    bundle: ModelBundle
    config: Config
    comm: AbstractComm
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter, whole, in the module's order."""
    parameters: dict[str, Parameter]
    """Those that are trained, as a checkpoint tells of them."""
    tied: dict[str, str]
    attention: Attention
    loss: LossKernel
    step: int
    """Where it begins, or goes on from."""
    start: Mapping[str, Any] | None
    """`path` and `xxh3` of the adapter that losses compare with, beside the model; on rank 0, where there is one."""

    def describe(self, identity: Mapping[str, Any], made_by: Mapping[str, Any]) -> Callable[..., Manifest]:
        """What a checkpoint says of itself, as a function of state and metrics."""
        plain = frozen.to_plain(self.config)

        def manifest(state: State, metrics: dict[str, float]) -> Manifest:
            counters = self.strategy.counters()
            parameters = self.parameters
            if not counters["updates"]:
                parameters = {name: dataclasses.replace(one, states=(WEIGHT,)) for name, one in parameters.items()}
            return Manifest(
                step=state.step, progress=state.as_dict(), counters=counters, parameters=parameters, tied=self.tied,
                metrics=metrics, identity=identity, config=plain, made_by={**made_by, "time": utc()},
                base=self.base(identity.get("base")),
            )  # fmt: skip

        return manifest

    def base(self, digest: str | None) -> dict[str, Any] | None:
        """What is said of the weights that stay as they are; None where all are trained."""
        if len(self.parameters) == len(self.shapes):
            return None
        return base_of(self.config.model, digest, adapter=self.bundle.adapter is not None, start=self.start)

    @property
    def lines(self) -> list[str]:
        """What runs, in words."""
        num = sum(math.prod(shape) for shape in self.shapes.values())
        trained = sum(math.prod(one.shape) for one in self.parameters.values())
        of = "" if trained == num else f", of which {trained:,} are trained ({100 * trained / num:.3g} %)"
        assert isinstance(self.config.batch.global_batch, int)
        batch = BatchPlan(self.config.batch.global_batch, int(self.config.batch.micro_batch), self.comm.size)
        return [
            f"{num / 1e6:,.1f} M parameters{of} on {self.comm.size} {self.config.device} "
            f"rank{'s' * (self.comm.size > 1)}, {self.config.train.precision}",
            batch.describe(),
            self.attention.line,
            self.loss.line,
        ]

    def export(self, to: Path, digest: str | None = None, mark: Callable[[], None] = lambda: None) -> None:
        """Write the weights with config and tokenizer: of the whole model, or of an adapter alone. Collective: rank 0
        writes, one tensor at a time. `digest`: of the weights that stay as they are. `mark` hears of each tensor.
        """
        tensors = _in_step(self.strategy.full_state(self.parameters), self.comm, mark)
        if self.comm.rank != 0:
            for _ in tensors:
                pass
            return
        assert self.config.export.dtype != "auto"
        how: dict[str, Any] = {"assets": self.bundle.assets, "dtype": self.config.export.dtype,
                               "max_shard_bytes": self.config.export.max_shard_gb * 1e9}  # fmt: skip
        adapter = self.bundle.adapter
        if adapter is not None:
            learned = dict(tensors)
            write_export(adapter.tensors(learned.__getitem__), adapter.shapes(), to, **how,
                         adapter=Adapter(adapter.config, self.base(digest) or {}))  # fmt: skip
            return
        name_of = self.bundle.export_name
        whole = with_frozen(tensors, self.shapes, self.bundle.weights)
        write_export(((name_of(name), tensor) for name, tensor in whole),
                     {name_of(name): shape for name, shape in self.shapes.items()}, to, **how)  # fmt: skip


@final
class _Later(AbstractWeights):
    """Zeros for what is trained, which a checkpoint is to fill; the rest is the model's own."""

    def __init__(self, trained: Container[str], base: AbstractWeights) -> None:
        self._trained, self._base = trained, base

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        return torch.zeros(1).expand(numel) if name in self._trained else self._base.read(name, start, numel)


def build(  # noqa: PLR0913 - it is all that a run is made of
    config: Config,
    world: World,
    comm: AbstractComm,
    *,
    assets: Path,
    rows: tuple[AbstractStore | Streams, AbstractStore],
    pad_id: int,
    resume: Sequence[Path] = (),
    note: Callable[[str], None] = print,
    mark: Callable[[], None] = lambda: None,
    cache: Path | None = None,
) -> Built:
    """`config` is settled: no `auto` is left in it. `resume`: checkpoints, of which the first that is what was written
    is gone on from; `note` hears which were passed over, and `mark` that they are still being read. `cache`: where an
    objective may keep what it found out, beside `assets` where it is not given. Collective.
    """
    assert config.train.precision != "auto", config.train.precision
    assert config.train.steps is not None
    assert isinstance(config.batch.global_batch, int)
    assert config.batch.micro_batch != "auto"
    assert config.optim.lr != "auto"
    torch.manual_seed(config.run.seed)
    bundle = config.model.build(assets, seed=config.run.seed)
    setting = Setting(comm.device, DTYPES[config.train.precision], config.dataset.packing)
    attention, loss = bundle.choose_attention(setting, comm), bundle.choose_loss(setting, comm)
    bundle = config.tuning.apply(bundle, seed=config.run.seed)
    if config.train.activation_checkpointing:
        for block in bundle.blocks:
            recompute(block)
    named = dict(bundle.module.named_parameters())
    shapes = {name: tuple(param.shape) for name, param in named.items()}
    optim = Optim(
        config.optim, config.train.precision, config.train.grad_clip, config.tuning.lr_factor, bundle.alongside
    )
    parameters = {name: Parameter(shape, (WEIGHT, *optim.state_names), bundle.export_name(name))
                  for name, shape in shapes.items() if named[name].requires_grad}  # fmt: skip
    strategy = config.strategy.build(world, comm, optim)
    state, blobs = State(), None
    if resume:
        strategy.wrap(dataclasses.replace(bundle, weights=_Later(parameters, bundle.weights)))
        restored = restore(resume, strategy, parameters, functools.partial(_wanted, comm=comm), comm, note, mark)
        state = _state(restored)
        blobs = restored.kept.get(_before(restored.manifest, comm) or "")
    else:
        strategy.wrap(bundle)
    course = Course(
        steps=config.train.steps,
        lr=config.optim.lr,
        schedule=config.schedule,
        batch=BatchPlan(config.batch.global_batch, config.batch.micro_batch, comm.size),
        seed=config.run.seed,
        pad_id=pad_id,
        eval_every=config.eval.every_steps,
        eval_max_rows=config.eval.max_rows,
        compare_every=config.train.compare_every,
        max_leap=config.train.max_leap,
        leave_out=frozenset(config.train.leave_out),
        flops_per_token=config.model.figures().flops_per_token(
            config.dataset.max_length, sum(math.prod(one.shape) for one in parameters.values())
        ),
        peak_flops=_peak(comm.device, config.train.precision),
        collate=config.objective.collator() or collate,
        metrics=config.objective.metrics,
        confusion=config.objective.confusion,
    )

    def begin(say: Callable[[str], None], at: Callable[[Sequence[int]], None]) -> Before | None:
        found = around(config, bundle, strategy, comm, rows, pad_id=pad_id, cache=cache or assets.parent,
                       resumed=bool(resume), say=say, at=at)  # fmt: skip
        return config.objective.begin(found)

    # Dropout differs between ranks, and after a change of their number between the parts of the run.
    rng.seed(config.run.seed + 1 + comm.rank + state.step * 2**20)
    if blobs is not None:
        rng.load(blobs, comm.device)
    unseen = config.strategy.unsavable() is not None
    replicas = None if unseen or not config.train.compare_every else Replicas(strategy, comm)
    proof = (
        None
        if unseen or config.train.unmoved == "allow"
        else Proof(strategy, comm, list(parameters), config.tuning.moves_first)
    )
    sampler = Sampler(config, bundle, strategy, comm) if config.eval.prompts else None
    engine = Engine(course, strategy, config.objective.build(), comm, rows, state=state, begin=begin, proof=proof,
                    alongside=bundle.alongside, sampler=sampler, replicas=replicas)  # fmt: skip
    tied = _tied(bundle.module, list(parameters))
    return Built(engine, strategy, bundle, config, comm, shapes, parameters, tied, attention, loss, state.step,
                 _start(config) if comm.rank == 0 else None)  # fmt: skip


def _start(config: Config) -> dict[str, Any] | None:
    first = compared_with(frozen.to_plain(config))
    if first is None:
        return None
    return {"path": str(Path(first).resolve()), "xxh3": files_digest(Path(first))}


def _wanted(read: Manifest, comm: AbstractComm) -> list[str]:
    """Files of which this rank needs what ranks kept for themselves: the state of its generators, or places in data."""
    if State.from_dict(read.progress).stream is not None:
        return list(read.files)
    file = _before(read, comm)
    return [] if file is None else [file]


def _before(read: Manifest, comm: AbstractComm) -> str | None:
    """The file of the rank that was where this one is; None where there were more or fewer of them."""
    return file_name(comm.rank) if read.made_by.get("size") == comm.size else None


def _state(restored: Restored) -> State:
    """The engine's own."""
    state = State.from_dict(restored.manifest.progress)
    if state.stream is None:
        return state
    return dataclasses.replace(state, stream=merged(state.stream, [
        kept[BLOB] for kept in restored.kept.values() if BLOB in kept
    ]))  # fmt: skip


def _tied(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Further names of parameters, each with the one that is kept."""
    kept = {id(module.get_parameter(name)): name for name in names}
    return {name: kept[id(param)] for name, param in module.named_parameters(remove_duplicate=False)
            if id(param) in kept and kept[id(param)] != name}  # fmt: skip


def _peak(device: torch.device, precision: str) -> float | None:
    """The data sheets' peaks are of 16 bits."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def _in_step(tensors: Iterable[tuple[str, torch.Tensor]], comm: AbstractComm,
             mark: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """All ranks wait for each other at every tensor, so that no wait is longer than the writing of one. Collective."""
    for one in tensors:
        comm.barrier()
        mark()
        yield one


def recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass, and run it again there (arXiv 1604.06174)."""
    forward = block.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = checkpointed
