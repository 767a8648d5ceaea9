"""What each group of choices must answer. One page; the choices themselves live in the plural folders.

A spec is a frozen set of typed values, named by `_target_` in a YAML of `conf/<group>/`. It is cheap to make and to
import (no torch): what is live is made by its `build`, which only the engine calls.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as _pydantic_dataclass

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.comm import AbstractComm
    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.datasets.base import Example
    from dtrain.models.base import ModelBundle
    from dtrain.objectives.base import Around, Before, Loss
    from dtrain.plan.figures import Figures
    from dtrain.plan.machine import Machine
    from dtrain.plan.memory import Need, StateBytes
    from dtrain.plan.world import Device, Topology, World
    from dtrain.strategies.base import AbstractStrategy, Optim
    from dtrain.trackers.base import AbstractTracker

T = TypeVar("T")
OnLong = Literal["auto", "split", "truncate", "drop", "error"]
"""What becomes of an example of more than `max_length` tokens: cut into pieces, cut off at the end, left out, refused.
`auto` splits a text, so that all of it is learned, and truncates anything else, whose pieces would lack their
beginning. Each case is counted and told."""
OnDry = Literal["stop", "repeat", "drop"]
"""Where an epoch of a mixture ends, and what becomes of a source that has been seen whole before that: with the first
that is (stop); with the last, the others starting again (repeat); with the last, the others being left out (drop)."""
OnBadRow = Literal["error", "skip"]
"""What becomes of a row that cannot be used. Each is counted and told."""
_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=False, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose values are checked and whose unknown keys are refused."""
    return _pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Command:
    """A process to start: never a shell string."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """What is added to the environment of the parent."""


@dataclasses.dataclass(frozen=True)
class Gathering:
    """How the machines of a run find each other."""

    leads: bool | None = None
    """Whether this one leads; None: whichever is first."""
    host: str | None = None
    """What the others reach the one that leads by; found out where it is not given."""
    port: int | None = None
    timeout_s: float = 600.0
    least: int | None = None
    """So many machines are enough, and others may leave and join while it runs; None: all must be there."""
    last_call_s: float = 0.0
    """Once enough are there, how long no other must have come before they start."""
    start: str | None = None
    """A name that what has started all of them gave to this start; None where each was started by itself."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the launchers of several machines meet, and how this one is reached."""

    host: str
    port: int
    id: str
    is_host: bool
    local: str
    interface: str | None


@dataclasses.dataclass(frozen=True)
class Restarts:
    """What becomes of a run that failed."""

    most: int = 0
    """How often in a row it is started again; never for what the user typed, nor without progress."""
    wait_s: float = 10.0
    """Before the first of them; doubled each time."""
    counts_lost: bool = True
    """Whether an attempt counts that ended because a machine was lost."""
    code: int | None = None
    """The exit code after which whatever started the command starts it again; None: nobody does."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a scheduler is given instead of the processes being started here."""

    script: str
    submit: Sequence[str]
    """The command that hands it over, but for the script's path; it prints the job's number first."""
    follow: Callable[[str], Mapping[str, Sequence[str]]]
    """Of the job's number: commands to type next, by what they are for."""
    prepare: bool
    """Data and model are prepared before it is handed over."""
    now: bool
    """There is an allocation already: the script is run rather than handed over."""
    file: str = "job.sh"
    """What the script is called in the run's folder."""
    task: str = "{job}"
    """What the scheduler calls one of its runs, by {job}, its number, and {place}, that of the run in it."""
    elsewhere: bool = False
    """It may be handed over from another machine, where the command for that is not found on this one."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A process to start here which has other machines start theirs, and lives as long as they do."""

    hosts: Sequence[str]
    command: Command
    told: bytes
    """What the machines are to do, in JSON, which it is given to read. What it reads from is left open, and its end
    tells the other machines that this one is gone."""
    unread: bool = False
    """Its argv says that already, and it is given nothing to read."""
    named: bool = False
    """It begins each line with the machine's name, and says how each that failed has ended, as pdsh does."""
    left_out: Sequence[str] = ()
    """Variables with secrets, which are not passed on where argv would show them."""


class AbstractSpec(ABC):  # noqa: B024 - what is abstract differs by group
    group: ClassVar[str] = ""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that a user of the library behind would look for here, and the keys of dtrain to use instead."""

    by_choice: ClassVar[Mapping[str, str]] = {}
    """Keys that a choice's file alone sets, and what to choose instead of typing them."""

    def problems(self) -> list[str]:
        """What is wrong with these values taken together, each as `key: value, reason, way out`; none as a rule."""
        return []

    def packages(self) -> Mapping[str, str]:
        """Values that name what is imported, each as `key=value`, and its package, which `plugins` must allow."""
        return {}


class ModelSpec(AbstractSpec):
    group = "model"

    @abstractmethod
    def trained(self) -> bool:
        """Whether its weights come trained; `optim.lr=auto` is then a rate for fine-tuning."""

    def misfits(self, device: Device) -> list[str]:
        """What is wrong with these values on such a device, each as `key: value, reason, way out`; none as a rule."""
        return []

    def masks(self) -> bool:
        """Whether attention makes a number for each pair of tokens of a row; for the memory table."""
        return False

    @abstractmethod
    def figures(self) -> Figures:
        """The architecture in numbers, without a download where the YAML carries them. Raises ModelError."""

    @abstractmethod
    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        """Fetch or make what the build needs (config, tokenizer, weights); returns its folder, which all ranks read.

        Runs once, before any worker, without torch. `texts` yields the training text, for a model whose tokenizer is
        built from it. The folder has `config.json`, `tokenizer.json` and `tokenizer_config.json`. Raises ModelError.
        """

    @abstractmethod
    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        """The module on the meta device, and where its weights come from. Holds no weights."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a mixture is made of."""

    datasets: Mapping[str, DatasetSpec]
    weights: Mapping[str, float]
    """By tokens."""
    on_dry: OnDry


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A part of a dataset that can be read without the others: what it means, the dataset knows."""

    name: str = ""
    start: int = 0
    end: int | None = None
    """None: to the end."""


class DatasetSpec(AbstractSpec):
    group = "dataset"
    max_length: int
    packing: bool
    on_long: OnLong
    on_bad_row: OnBadRow
    max_bad_fraction: float
    streaming: bool
    stream_shards: int
    stream_buffer: int

    def notes(self) -> list[str]:
        """How the rows are read, found by looking at the first of them, a line each. Raises DataError."""
        return []

    def shapes(self) -> Sequence[type[Example]]:
        """All that its rows can have, where they are known without looking at any; none where they are not."""
        return ()

    def size(self) -> int | None:
        """Bytes of text in all of it, about, to tell how long it will take; None where nobody knows."""
        return None

    def parts(self) -> Parts | None:
        """The datasets that this one mixes, each of which is prepared by itself; none as a rule."""
        return None

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Rows in file order, each in one of the shapes of `datasets.base`. Raises DataError with file and line."""

    @abstractmethod
    def digest(self) -> str:
        """A digest of all that `examples` depends on; cheap enough for every start."""

    def spans(self) -> Sequence[Span]:
        """What a stream can read by itself, in order: together all of it, each row once. Raises DataError."""
        return (Span(),)

    def read(self, span: Span) -> Iterator[Example]:
        """The rows of a span, in order, the same each time. A row that cannot be used raises DataError at once where
        `on_bad_row` is error, else it is there as what it is counted by.
        """
        return self.examples()

    def told(self, source: str) -> str:
        """The place of an example that `read` yielded, as a person looks for it: `file:line`."""
        return source


class ObjectiveSpec(AbstractSpec):
    """What is learned of an example, and what the loss of a micro-batch is. Everything that a target is belongs here: a
    token, a pair, a labelled text; `collate` counts them, and `build` returns sums over them.
    """

    group = "objective"
    keeps_targets: ClassVar[bool] = False
    """Whether an example that is truncated loses some of what comes before its targets, rather than its end."""

    of_loss: ClassVar[frozenset[str]] = frozenset()
    """Fields that the rows do not depend on, so that prepared ones serve for other values too."""
    learns_tokens: ClassVar[bool] = True
    """Whether an example of which no token is a target has nothing to learn."""
    lr_scale: ClassVar[float] = 1.0
    """What `optim.lr=auto` is multiplied by for weights that come trained."""
    measured: ClassVar[tuple[str, ...]] = ()
    """The names of its `metrics`, which `checkpoint.best_by` may be."""

    def outputs(self) -> Sequence[str]:
        """The names of a model's outputs, one number each, in place of its vocabulary; none for a language model."""
        return ()

    def candidates(self) -> Sequence[ObjectiveSpec]:
        """What `resolve` may come to; none where that is known to be itself."""
        return ()

    def resolve(self, shape: type[Example]) -> ObjectiveSpec:
        """The objective to use for rows of this shape: itself, or what `auto` chooses. Raises DataError."""
        return self

    def among(self, shapes: Sequence[type[Example]]) -> ObjectiveSpec:
        """The same for rows of several shapes, or of one, as a mixture has them. Raises DataError."""
        return self.resolve(shapes[0]) if len(shapes) == 1 else self

    def notes(self, shape: type[Example]) -> list[str]:
        """What a user should know of what is learned of rows of this shape; none where it goes without saying."""
        return []

    def settle(self, examples: Iterable[Example]) -> Mapping[str, Any]:
        """Fields whose values are found in the data, as plain ones; looked for once, before anything is encoded, and
        only where the objective reads `examples`. Raises DataError.
        """
        return {}

    def together(self, examples: list[Example]) -> list[Example]:
        """The same number of examples, for an objective that looks at one in the light of those beside it."""
        return examples

    @abstractmethod
    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        """Tokens of one example, and which of them are targets. Raises DataError.

        Documents of one row stay together: they are packed as one, and cut to the same length.
        """

    def encode_many(self, examples: Sequence[Example], tokenizer: TextTokenizer) -> Sequence[Row] | None:
        """The same of several at once, for an objective that is faster so and refuses no row by itself; None where each
        is to be encoded alone.
        """
        return None

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch] | None:
        """What makes a micro-batch of rows, their ids and the padding token, and counts its targets; of no rows one
        that keeps collectives matched. None where targets are tokens.
        """
        return None

    def begin(self, around: Around) -> Before | None:
        """What is to be found out about the micro-batches of a step before their losses; None where there is nothing.
        Called once, before the first step. Collective.
        """
        return None

    @abstractmethod
    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        """The loss of one micro-batch, as a sum over targets."""

    def metrics(self, sums: Mapping[str, Sequence[float]], num_targets: int) -> Mapping[str, float]:
        """What to tell of an eval, of the sums of the losses' `extras`, flattened: means over targets where there is no
        more to say.
        """
        return {name: values[0] / max(1, num_targets) for name, values in sums.items() if len(values) == 1}

    def confusion(self, sums: Mapping[str, Sequence[float]]) -> tuple[Sequence[str], Sequence[Sequence[int]]] | None:
        """Of an eval, labels, and how often each was taken for each; None where nothing is classified."""
        return None


class TemplateSpec(AbstractSpec):
    group = "template"
    name: str
    """What messages call it."""
    text: str
    """Jinja; empty is the tokenizer's own."""
    ends: tuple[str, ...]
    """The tokens that end a turn, or `eos_token` for the tokenizer's; empty is any of its special tokens."""

    @abstractmethod
    def settled(self) -> TemplateSpec:
        """With what lies in a file read in, so that all ranks and later starts have the same. Raises ConfigError."""


class TuningSpec(AbstractSpec):
    group = "tuning"

    lr_scale: ClassVar[float] = 1.0
    """What `optim.lr=auto` is multiplied by."""
    state_bytes: ClassVar[int] = 0
    """What it keeps of each trainable parameter beside the optimizer's state."""

    @abstractmethod
    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        """Choose what is trained (`requires_grad`), and add what the method adds. The module is on meta. Raises
        ModelError.
        """

    @abstractmethod
    def num_trainable(self, figures: Figures) -> int:
        """Parameters that get a gradient; for the memory table."""

    def num_frozen(self, figures: Figures) -> int:
        """Parameters that get none."""
        return figures.num_params - self.num_trainable(figures)

    def frozen_bytes(self, figures: Figures, compute_bytes: int) -> float:
        """Of what `num_frozen` counts, where it is whole on a rank."""
        return float(compute_bytes * self.num_frozen(figures))

    def divides(self) -> bool:
        """Whether a strategy that divides parameters divides those that are frozen too."""
        return True

    def num_virtual(self) -> int:
        """Places that it puts before every document, beside the tokens of a row."""
        return 0

    def keeps(self) -> bool:
        """Whether parameters of the model stay as they are: it is then named in every checkpoint, by its content."""
        return True

    def misfits(self, strategy: StrategySpec, precision: str, device: Device) -> list[str]:
        """Why it cannot be used so, each as `key: value, reason, way out`; none as a rule."""
        return []

    def lr_factor(self, name: str) -> float:
        """What the learning rate is multiplied by for the parameter of this name."""
        return 1.0

    def moves_first(self, name: str) -> bool:
        """Whether the trained parameter of this name gets a gradient in the very first step."""
        return True


class OptimSpec(AbstractSpec):
    group = "optim"
    fresh_lr: ClassVar[float]
    """What `lr=auto` is for fresh weights."""
    tuning_lr: ClassVar[float]
    """What `lr=auto` is for weights that come trained."""
    lr: float | Literal["auto"]
    state_bytes: ClassVar[int]
    """Optimizer state per trainable parameter."""
    state_names: ClassVar[tuple[str, ...]]
    """The tensors of that state, as shards and checkpoints have them in fp32; besides them only a count of its steps
    may be kept."""

    def misfits(self, strategy: StrategySpec, device: Device) -> list[str]:
        """Why it cannot be used so, each as `key: value, reason, way out`; none as a rule."""
        return []

    @abstractmethod
    def build(
        self, named: Iterable[tuple[str, nn.Parameter]], lr_factor: Callable[[str], float] = lambda name: 1.0
    ) -> torch.optim.Optimizer:
        """The optimizer over those of these parameters that are trained, in groups with and without decay; each group
        says as `lr_factor` what the learning rate of a step is multiplied by for it.
        """


class ScheduleSpec(AbstractSpec):
    group = "schedule"
    warmup_steps: int

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at optimizer step `step` (from 0) of `steps`."""


class StrategySpec(AbstractSpec):
    group = "strategy"

    def candidates(self) -> Sequence[str]:
        """Choices of this group to pick the first fitting one from; empty for a choice that stands for itself."""
        return ()

    def misfits(self, topology: Topology, device: Device) -> list[str]:
        """What is wrong with these values on such ranks, each as `key: value, reason, way out`; none as a rule."""
        return []

    def unsavable(self) -> str | None:
        """Why a run can neither save nor go on from a checkpoint, as `key=value: reason`; None where it can."""
        return None

    @abstractmethod
    def states(self, need: Need) -> StateBytes:
        """Training state of one rank, for the memory table."""

    @abstractmethod
    def build(self, world: World, comm: AbstractComm, optim: Optim) -> AbstractStrategy:
        """The live strategy, before `wrap`."""


class LauncherSpec(AbstractSpec):
    group = "launcher"

    @abstractmethod
    def topology(self, device: Device, machine: Machine) -> Topology:
        """Nodes and processes per node. `machine` is where the command is typed. Raises PlanError."""

    @abstractmethod
    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        """The process that starts `python -m dtrain <worker>` on every rank of this machine; `meeting` is given where
        there are others.
        """

    def machine(self, here: Machine) -> Machine:
        """The machines that it starts ranks on, as far as this one can tell."""
        return here

    def gathering(self) -> Gathering:
        """How the machines find each other, where there are several."""
        return Gathering()

    def restarts(self) -> Restarts:
        """How often, and after what, a run that failed is to be started or queued again."""
        return Restarts()

    def everywhere(self, argv: Sequence[str]) -> Sequence[str] | None:
        """What runs `python -m dtrain <argv>` once on each machine, and prints what all of them print; None where there
        is no way to others. Raises ConfigError.
        """
        return None

    def job(self, run_dir: Path, launch: Sequence[str]) -> Job | None:
        """What to hand to a scheduler, which is to type `python -m dtrain <launch>` on each machine; None where the
        processes are started here and now. Raises ConfigError.
        """
        return None

    def calls(self, launch: Sequence[str], control: Path) -> Sequence[Call]:
        """What has other machines type `python -m dtrain <launch>`; none where it is typed there already. The machines
        look into the folder `control` for what they are to do. The first machine leads. Raises ConfigError.
        """
        return ()

    def array(self, runs: Sequence[tuple[Path, Sequence[str]]]) -> Job | None:
        """The same for several runs, folder and `launch` of each, as tasks of one job; None where a job is for one run.
        Raises ConfigError.
        """
        return None

    def of_arrays(self) -> list[str]:
        """Values, each as `key=value`, that count only for tasks of one job; none as a rule."""
        return []


class TrackerSpec(AbstractSpec):
    group = "tracker"

    @abstractmethod
    def build(self, run_dir: Path, config: Mapping[str, Any], stream: TextIO) -> AbstractTracker:
        """The live tracker; `config` is the frozen configuration as plain data. Made on rank 0 only.

        `stream` is what the user sees; a worker's own stdout is its log.
        """


GROUPS: dict[str, type[AbstractSpec]] = {
    cls.group: cls
    for cls in (ModelSpec, DatasetSpec, TemplateSpec, ObjectiveSpec, TuningSpec, StrategySpec, OptimSpec, ScheduleSpec,
                LauncherSpec, TrackerSpec)
}  # fmt: skip
"""Every group that a YAML with `_target_` may stand in, and what its specs must be."""
