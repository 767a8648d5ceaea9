"""From a plan to a configuration without `auto`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config import frozen
from dtrain.config.spec import ObjectiveSpec
from dtrain.errors import ConfigError, DataError, PlanError
from dtrain.objectives.classify import Classify
from dtrain.objectives.dpo import DPO
from dtrain.objectives.kto import KTO
from dtrain.objectives.orpo import ORPO
from dtrain.objectives.pretrain import Pretrain
from dtrain.plan.describe import describe
from dtrain.plan.machine import Machine, peak_flops
from dtrain.plan.plan import num_steps
from dtrain.plan.propose import configure, propose
from dtrain.plan.settle import settle
from dtrain.plan.world import World

NO_GPU = Machine(cores=4, memory_bytes=32 * 2**30, gpus=0, gpu_name="", gpu_memory_bytes=0)
EIGHT = Machine(
    cores=64, memory_bytes=512 * 2**30, gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=80 * 2**30
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.plan.propose.look", lambda: NO_GPU)


@pytest.mark.parametrize(("typed", "rows", "steps"), [
    ("train.steps=7", 1000, 7),
    ("train.epochs=1", 160, 10),
    ("train.epochs=1", 161, 11),  # whole steps: nothing is dropped
    ("train.epochs=2.5", 64, 10),
    ("train.epochs=0.01", 16, 1),
    ("train.epochs=3", 17, 4),  # 51 / 16, not 3 times 2
])  # fmt: skip
def test_num_steps(typed: str, rows: int, steps: int) -> None:
    config, _ = configure([typed], None)
    assert num_steps(config, 16, rows) == steps


def test_nothing_is_left_open() -> None:
    proposal = propose(["batch.global_tokens=8192", "dataset.max_length=512", "train.epochs=1"], None)
    settled = settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 100)
    assert "auto" not in (settled.device, settled.train.precision, settled.batch.micro_batch, settled.export.dtype)
    assert (settled.batch.global_batch, settled.batch.global_tokens) == (16, None)
    assert (settled.train.steps, settled.train.epochs) == (7, None)
    assert settled.strategy == proposal.strategies[proposal.plan.strategy]
    assert settled.strategy.candidates() == ()
    assert frozen.to_plain(settled)["strategy"]["_target_"].endswith("DDP")


def test_the_typed_strategy_keeps_its_values() -> None:
    proposal = propose(["strategy=zero2", "strategy.reduce_bucket_size=1000"], None)
    assert (
        settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 16).strategy.reduce_bucket_size == 1000
    )


def test_too_few_rows() -> None:
    proposal = propose(["batch.global_batch=16"], None)
    settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 16)
    with pytest.raises(DataError, match=r"batch.global_batch=16: the dataset has only 15 training rows"):
        settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 15)


def test_as_many_rows_as_there_are() -> None:
    proposal = propose([], None)
    for num_rows, taken in ((100, 16), (15, 15), (1, 1)):
        settled = settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), num_rows)
        assert settled.batch.global_batch == taken


@pytest.mark.parametrize(("typed", "micro", "accumulate"), [
    ("batch.global_batch=16 launcher.procs=1", 8, 2),  # on CPU not more than 8 at a time
    ("batch.global_batch=12 launcher.procs=1", 6, 2),  # two of six rather than one of eight and one of four
    ("batch.global_batch=3 launcher.procs=8", 1, 1),
    ("batch.global_batch=16 launcher.procs=1 batch.micro_batch=5", 5, 4),
    ("batch.global_batch=4 launcher.procs=1 batch.micro_batch=64", 64, 1),
])  # fmt: skip
def test_micro_batch(typed: str, micro: int, accumulate: int) -> None:
    plan = propose(typed.split(), None).plan
    assert (plan.batch.micro_batch, plan.batch.accumulate) == (micro, accumulate)


def test_auto_takes_the_first_that_fits() -> None:
    def chosen(gib: float, *typed: str) -> str:
        return propose(["model=qwen7b", "device=cuda", "launcher.procs=8", f"device_memory_gb={gib}", *typed], None,
                       elsewhere=True).plan.strategy  # fmt: skip

    assert [chosen(gib) for gib in (141, 80, 48, 32)] == ["ddp", "zero1", "zero2", "fsdp2"]
    assert chosen(141, "strategy.order=[zero3,ddp]") == "zero3"


def test_what_does_not_fit_is_told_and_done(monkeypatch) -> None:
    """Who names a strategy may know better than a formula."""
    plan = propose(
        ["model=qwen7b", "device=cuda", "strategy=ddp", "launcher.procs=8", "device_memory_gb=24"], None, elsewhere=True
    ).plan
    assert not plan.fits
    assert any(note.startswith("does not fit by the formula: ") for note in plan.notes)
    assert plan.batch.micro_batch == 1


def test_where(monkeypatch) -> None:
    assert (propose([], None).plan.device, propose([], None).plan.precision) == ("cpu", "fp32")
    monkeypatch.setattr("dtrain.plan.propose.look", lambda: EIGHT)
    plan = propose([], None).plan
    assert (plan.device, plan.precision, plan.topology.size, plan.capacity_bytes) == ("cuda", "bf16", 8, 80 * 2**30)
    assert propose(["device=cpu"], None).plan.device == "cpu"


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some GPU") is None


def test_world_from_the_environment() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = World.from_env("cpu", env)
    assert (world.rank, world.size, world.local_rank, world.topology.nodes, world.topology.procs_per_node) == (
        5,
        8,
        1,
        2,
        4,
    )
    assert World.from_env("cpu", {}).size == 1
    with pytest.raises(Exception, match="RANK set in the environment but not WORLD_SIZE, LOCAL_RANK"):
        World.from_env("cpu", {"RANK": "0"})


def test_a_step_beyond_the_epochs_is_not_left_out() -> None:
    proposal = propose(["train.epochs=1", "train.steps=null", "train.leave_out=[7]"], None)
    settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 7 * 16)
    with pytest.raises(ConfigError, match=r"train.leave_out=\[7\]: beyond train.steps=6"):
        settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 6 * 16)


@pytest.mark.parametrize(("objective", "typed", "lr"), [
    (DPO(), ["model=qwen0_5b"], 1e-6),
    (DPO(), ["model=qwen0_5b", "tuning=lora"], 1e-5),
    (KTO(), ["model=qwen0_5b"], 1e-6),
    (ORPO(), ["model=qwen0_5b"], 5e-6),
    (Pretrain(), ["model=qwen0_5b"], 2e-5),
    (DPO(), ["model=tiny"], 1e-3),
    (DPO(), ["model=qwen0_5b", "optim.lr=3e-4"], 3e-4),
], ids=str)  # fmt: skip
def test_the_rate_is_that_of_the_objective_which_the_rows_call_for(
    objective: ObjectiveSpec, typed: list[str], lr: float
) -> None:
    proposal = propose(["objective=auto", "device_memory_gb=80", *typed], None)
    assert settle(proposal.config, proposal.plan, proposal.strategies, objective, 100).optim.lr == lr
    name = type(objective).__name__.lower()
    named = propose([f"objective={name}", "device_memory_gb=80", *typed], None).plan
    assert named.lr == lr
    scaled = objective.lr_scale != 1.0 and "model=tiny" not in typed and not typed[-1].startswith("optim")
    assert any(f"for objective={name}" in note for note in named.notes) == scaled


_TRAINED = "the weights come trained"
_EITHER = "2e-05 (1e-06 for dpo, kto)"
_OPEN = f"{_TRAINED}; 1e-06 for dpo, kto, if the rows call for that (objective=auto)"


@pytest.mark.parametrize(("typed", "rate", "note"), [
    ([], _EITHER, _OPEN),
    (["tuning=lora"], "0.0002 (1e-05 for dpo, kto)",
     f"{_TRAINED}, times 10 for tuning=lora; 1e-05 for dpo, kto, if the rows call for that (objective=auto)"),
    (["dataset.shape=preference"], "1e-06", f"{_TRAINED}, times 0.05 for objective=dpo"),
    (["dataset.shape=completion"], "2e-05", _TRAINED),
    (["dataset=stdlib"], "2e-05", _TRAINED),
    (["dataset=stdlib", "objective.train_on=all"], _EITHER, _OPEN),  # refused when the rows are read
    (["dataset=mixture", "dataset.sources={a:{path:a.jsonl,shape:kto},b:{path:b.jsonl,shape:kto}}"], "1e-06",
     f"{_TRAINED}, times 0.05 for objective=kto"),
    (["dataset=mixture", "dataset.sources={a:{path:a.jsonl,shape:kto},b:{path:b.jsonl}}"], _EITHER, _OPEN),
    (["objective=orpo"], "5e-06", f"{_TRAINED}, times 0.25 for objective=orpo"),
    (["model=tiny"], "0.001", "the weights are fresh"),
    (["optim.lr=3e-4"], "0.0003", None),
])  # fmt: skip
def test_what_is_not_known_of_the_rate_is_said(
    typed: list[str], rate: str, note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("no row that could be read\n")
    data = [] if any(text.startswith("dataset=") for text in typed) else ["dataset=files", "dataset.path=a.jsonl"]
    found = propose(["model=qwen0_5b", "device_memory_gb=80", *data, *typed], None)
    assert f"optimizer  adamw, rate {rate}, cosine" in describe(found.config, found.plan)
    told = [line.partition(": ")[2] for line in found.plan.notes if line.startswith("optim.lr=auto takes ")]
    assert told == ([] if note is None else [note])


EACH = ["checkpoint.every_steps=10", "eval.every_steps=10"]


@pytest.mark.parametrize(("typed", "said"), [
    (["checkpoint.best_by=acuracy", *EACH], r"nothing that this run measures; did you mean `accuracy`\?; there are "
                                            r"loss, eval_loss, accuracy, macro_f1, rewards/chosen, "),
    (["checkpoint.best_by=accuracy", "objective=pretrain", *EACH], r"measures; there are loss, eval_loss$"),
    (["checkpoint.best_by=eval_loss", "eval.fraction=0", *EACH], "eval.fraction=0 leaves none"),
    (["checkpoint.best_by=eval_loss", "eval.every_steps=10"], "checkpoint.every_steps=0 with eval.every_steps=10"),
    (["checkpoint.best_by=eval_loss", "checkpoint.every_steps=10", "eval.every_steps=0"], "every_steps=10 with eval.every_steps=0"),
])  # fmt: skip
def test_a_best_that_nothing_would_be_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(PlanError, match=f"checkpoint.best_by=.*{said}"):
        propose(typed, None)


def test_what_the_best_is_told_by_is_measured_by_the_objective_of_the_rows() -> None:
    proposal = propose(["checkpoint.best_by=accuracy", *EACH], None)
    with pytest.raises(ConfigError, match="nothing that this run measures"):
        settle(proposal.config, proposal.plan, proposal.strategies, Pretrain(), 100)
    named = Classify(labels=("a", "b"))
    settled = settle(proposal.config, proposal.plan, proposal.strategies, named, 100)
    assert settled.objective == named


def test_which_checkpoints_may_be_the_best_is_told() -> None:
    typed = ["checkpoint.every_steps=20", "eval.every_steps=50", "checkpoint.best_by=eval_loss"]
    for more, said in (([], " (min) of those of each 100 steps stay"), (["eval.every_steps=10"], " (min) stay")):
        proposal = propose([*typed, *more], None)
        assert f"the best by eval_loss{said}" in describe(proposal.config, proposal.plan)
    loss = propose(["checkpoint.every_steps=20", "checkpoint.best_by=loss", "eval.fraction=0"], None)
    assert "the best by loss (min) stay" in describe(loss.config, loss.plan)
