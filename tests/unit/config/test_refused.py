"""What a user may type wrong: refused with the key, the value and the way out, all of it at once, without a traceback."""

from __future__ import annotations

import pytest

from dtrain.errors import ConfigError, UserError
from dtrain.plan.propose import configure, propose

REFUSED = [
    # unknown keys, at every level and with every mark of Hydra's
    ("foo=1", "foo: unknown key; there are: model, dataset"),
    ("+foo=1", "foo: unknown key"),
    ("++foo=1", "foo: unknown key"),
    ("trian.steps=1", "trian: unknown key; did you mean `train`?"),
    ("train.stepz=1", "train.stepz: unknown key; did you mean `steps`?"),
    ("+train.stepz=1", "train.stepz: unknown key; did you mean `steps`?"),
    ("++batch.globl_batch=1", "batch.globl_batch: unknown key; did you mean `global_batch`?"),
    ("model.hiden=64", "model.hiden: unknown key; did you mean `hidden`?"),
    ("+tracker.console.lives=1", "tracker.console.lives: unknown key; did you mean `live`?"),
    ("train={stepz:3}", "train.stepz: unknown key"),
    ("train._target_=os.system", "train._target_: unknown key"),
    ("_target_=os.system", "_target_: unknown key"),
    ("strategyy=zero3", "strategyy: unknown key; did you mean `strategy`?"),
    ("a=", "a: unknown key"),
    # keys of other sections, of other choices, and of other trainers
    ("steps=3", "steps: unknown key; here it is train.steps"),
    ("every_steps=3", "every_steps: unknown key; here it is eval.every_steps or checkpoint.every_steps"),
    ("learning_rate=1", "learning_rate: unknown key; here it is optim.lr"),
    ("train.lr=1", "train.lr: unknown key; here it is optim.lr"),
    ("Per-Device-Train-Batch-Size=1", "here it is batch.micro_batch"),
    ("eval.steps=3", "eval.steps: unknown key; did you mean `every_steps`?"),
    ("tuning.rank=8", "tuning.rank: not a key of this choice; there is one with tuning=lora, qlora, adalora"),
    ("strategy.offload_optimizer=cpu", "there is one with strategy=zero1, zero2, zero3"),
    ("model=tiny model.path=x", "there is one with model=hf, "),
    # groups
    ("strategy=zero9", "strategy=zero9: no such choice; did you mean `zero3`? (there are: auto, ddp"),
    ("+strategy=zero9", "strategy=zero9: no such choice"),
    ("strategy=", "strategy=: no choice given"),
    ("strategy=''", "strategy='': no choice given"),
    ("strategy=null", "strategy=null: one must be chosen"),
    ("~strategy", "strategy=null: one must be chosen"),
    ("strategy=[ddp]", "strategy=[ddp]: takes one choice"),
    ("strategy=ddp,zero1", "strategy=ddp,zero1: takes one choice; for a run of each of several type -m"),
    ("tracker=console,jsonl", "for several at once type tracker=[console,jsonl]"),
    ("tracker=[console,nope]", "tracker=nope: no such choice"),
    ("model@foo=tiny", "model@foo=tiny: a group has one place; type model=tiny"),
    ("experiment=nope", "experiment=nope: no such choice"),
    ("experiment.train.steps=3", "experiment: a group, chosen as a whole"),
    ("model={hidden:3}", "model={hidden:3}: takes one choice"),
    # steps to leave out
    ("train.leave_out=[121,3]", "train.leave_out=[121]: beyond train.steps=120; name steps of the run"),
    ("train.leave_out=[0]", "train.leave_out=0: not at least 1"),
    ("train.max_leap=0", "train.max_leap=0: not more than 0"),
    # not overrides
    ("a", "a: not an override; write key=value"),
    ("my.yaml", "write key=value, or, for a file of them, FOLDER/experiment/NAME.yaml, --config-dir FOLDER experiment=NAME"),
    ("=", "=: not an override"),
    ("=3", "=3: not an override"),
    ("{", "{: not an override"),
    ("x\ny=1", "x y=1: not an override"),
    ("y" * 5000 + "=1", "...: not an override"),
    ("run.name='", "run.name=': brackets, quotes or other special characters do not match"),
    ('run.name="', "quotes or other special characters do not match"),
    ("run.dir=a'b", "put text in double quotes"),
    ("run.dir=${", "run.dir=${: brackets"),
    ("train.steps=1,2", "train.steps=1,2: several values; key=[a,b] is a list, and -m makes a run for each"),
    ("~nope", "'nope' does not exist"),
    # Hydra's own keys would be ignored
    ("hydra.run.dir=/x", "hydra.run.dir=/x: Hydra composes here and runs nothing"),
    ("hydra/launcher=submitit", "Hydra composes here and runs nothing"),
    # interpolations
    ("run.dir=${nope}", "run.dir: Interpolation key 'nope' not found"),
    ("run.dir=${oc.env:DTRAIN_NO_SUCH}", "run.dir: Environment variable 'DTRAIN_NO_SUCH' not found"),
    ("run.name=${run.name}", "run.name: Recursive interpolation"),
    # types and values
    ("optim.lr=abc", "optim.lr=abc: not a number"),
    ("train.steps=1.5", "train.steps=1.5: not a whole number"),
    ("train.steps=true", "train.steps=true: neither true nor false can be set here"),
    ("train.steps=", "train.steps=: not a whole number"),
    ("train.precision=int8", "train.precision=int8: not one of 'auto', 'bf16', 'fp32' or 'fp16'"),
    ("launcher.procs=0", "launcher.procs=0: not at least 1 and not 'auto'"),
    ("launcher.procs=two", "launcher.procs=two: not a whole number and not 'auto'"),
    ("train=3", "train=3: a section, not a value; its keys: steps"),
    ("model._target_=3", "model._target_=3: not the name of a spec"),
    ("device=gpu", "device=gpu: not one of auto, cpu, cuda"),
    ("device_memory_gb=nan", "device_memory_gb=nan: not a positive number"),
    ("device_memory_gb=inf", "device_memory_gb=inf: not a positive number"),
    ("device_memory_gb=true", "device_memory_gb=True: not a positive number"),
    ("~train", "train.steps: not given, and train.epochs neither"),
    ("train=null", "train.steps: not given"),
    # two numbers with one meaning
    ("train.steps=3 train.epochs=1", "train.steps=3 and train.epochs=1: one number says how long"),
    ("batch.global_batch=3 batch.global_tokens=512", "one number says how large a step is"),
    # names of runs
    ("run.name=a/b", "run.name=a/b: the name of a folder is made of letters"),
    ("run.name=..", "run.name=..: the name"),
    ("run.name=.cache", "run.name=.cache: the name"),
    ("run.name=", "run.name=: the name"),
    ('run.name="a "', "run.name=a : the name"),
    ("run.name=ü", "run.name=ü: the name"),
    ("run.name=" + "x" * 300, "xxx...: the name"),
    ("run.name=???", "run.name=???: the name"),
    ("run.dir=", "run.dir: empty; name a folder"),
    # keys as the libraries behind have them
    ("strategy=zero3 strategy.train_batch_size=3", "strategy.train_batch_size: unknown key; here it is batch.global_batch"),
    ("strategy=zero3 strategy.gradient_clipping=3", "here it is train.grad_clip"),
    ("tuning=lora tuning.r=8", "tuning.r: unknown key; here it is tuning.rank"),
    ("objective=kto objective.desirable_weight=2", "objective.desirable_weight: unknown key; here it is objective.good_weight"),
    ("strategy=zero1 strategy.offload_param=cpu", "only for stage 3"),
    ("strategy.stage=3", "strategy.stage: not a key of this choice"),
    ("experiment=smoke dataset.path=a", "dataset.max_files: not a key of this choice; there is one with dataset=stdlib; "
     "experiment=smoke sets it, ~dataset.max_files leaves it out"),
    ("strategy=zero3 strategy.stage=2", "strategy.stage=2: the choice says it; type strategy=zero1, zero2 or zero3"),
    ("experiment=medical_qa dataset.sources.a.path=a", "dataset.sources: not a key of this choice; there is one with dataset=mixture"),
    # code
    ("model._target_=os.system", "only specs of dtrain are imported by name"),
    ("model._target_=builtins.exec", "only specs of dtrain are imported by name"),
    ("tracker.console._target_=os.system", "tracker.console._target_=os.system: only specs of dtrain"),
    ("model._target_=dtrain.cli.run", "not a ModelSpec"),
    ("model._target_=dtrain.strategies.ddp.DDP", "not a ModelSpec"),
    ("model._target_=dtrain.config.spec.ModelSpec", "model._target_=dtrain.config.spec.ModelSpec: lacks assets, build, figures"),
    ("model._target_=dtrain.nope.X", "No module named 'dtrain.nope'"),
    ("model._target_=dtrain..x", "not the name of a spec"),
    ("plugins=[dtrain_no_such]", "plugins=[dtrain_no_such]: no such package; install it, or put its folder into PYTHONPATH"),
    ("plugins=3", "plugins=3: a list of names"),
    ("plugins=[a.b]", "plugins=['a.b']: a list of names"),
    ("plugins=[os] model._target_=os.system", "not a ModelSpec"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=[typed[:40] for typed, _ in REFUSED])
def test_refused_in_our_words(typed: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure([typed] if typed[0] in "=xy" or '"' in typed else typed.split(" "), None)
    message = str(caught.value)
    assert said in message
    assert len(message) < 1500
    assert "hydra.cc" not in message
    assert "Traceback" not in message


def test_all_problems_at_once() -> None:
    typed = ["foo=1", "model=nope", "optim.lr=abc", "run.dir='", "train.stepz=3", "launcher.procs=0", "hydra.x=1", "b"]
    with pytest.raises(ConfigError) as caught:
        configure(typed, None)
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    for start in (
        "foo:",
        "model=nope:",
        "optim.lr=abc:",
        "run.dir=':",
        "train.stepz:",
        "launcher.procs=0:",
        "hydra.x=1:",
        "b:",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)


ACCEPTED = [
    ("experiment=smoke dataset=hub dataset.name=a ~dataset.max_files", lambda c: c.dataset.name == "a"),
    ("+strategy=zero3", lambda c: c.strategy.stage == 3),
    ("strategy=zero3", lambda c: c.strategy.stage == 3),
    ("strategy='zero3'", lambda c: c.strategy.stage == 3),
    ("strategy=ddp strategy=zero3", lambda c: c.strategy.stage == 3),
    ("train.steps=3 train.steps=4", lambda c: c.train.steps == 4),
    ("+train.steps=3", lambda c: c.train.steps == 3),
    ("train={steps:3}", lambda c: c.train.steps == 3),
    ("train.epochs=2", lambda c: (c.train.steps, c.train.epochs) == (None, 2.0)),
    ("train.steps=null train.epochs=2", lambda c: (c.train.steps, c.train.epochs) == (None, 2.0)),
    ("batch.global_tokens=1024", lambda c: (c.batch.global_batch, c.batch.global_tokens) == (None, 1024)),
    ("tracker=[]", lambda c: c.tracker == {}),
    ("tracker=null", lambda c: c.tracker == {}),
    ("~tracker", lambda c: c.tracker == {}),
    ("tracker=console", lambda c: list(c.tracker) == ["console"]),
    ("+tracker=[jsonl,console]", lambda c: list(c.tracker) == ["jsonl", "console"]),
    ("tracker=[console,console]", lambda c: list(c.tracker) == ["console"]),
    ("experiment=null", lambda c: c.run.name == "demo"),
    ("experiment=smoke", lambda c: (c.run.name, c.train.steps, c.model.hidden) == ("smoke", 10, 64)),
    ("+experiment=smoke train.steps=3", lambda c: (c.train.steps, c.model.hidden) == (3, 64)),
    ("+experiment=smoke train.epochs=1", lambda c: c.train.steps is None),
    ("run.name=7", lambda c: c.run.name == "7"),
    ("run.name=${schedule.min_factor}", lambda c: c.run.name == "0.1"),
    ("run.dir=/data/Müller/文", lambda c: c.run.dir == "/data/Müller/文"),
    ("run.dir=a#b;c!&<d>", lambda c: c.run.dir == "a#b;c!&<d>"),
    ("run.dir=a=b", lambda c: c.run.dir == "a=b"),
    ('run.dir="it\'s mine"', lambda c: c.run.dir == "it's mine"),
    ("run.dir=${oc.env:PWD}", lambda c: c.run.dir.startswith("/")),
    ("plugins=null", lambda c: c.plugins == ()),
    ("plugins=json", lambda c: c.plugins == ("json",)),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "holds"), ACCEPTED, ids=[typed for typed, _ in ACCEPTED])
def test_accepted(typed: str, holds) -> None:
    config, _ = configure([typed] if '"' in typed else typed.split(" "), None)
    assert holds(config)


@pytest.mark.parametrize(("typed", "said"), [
    ("device=cuda", "device: cuda, but no GPU is visible here"),
    ("batch.global_tokens=1000 dataset.max_length=512", "not a multiple of dataset.max_length=512; nearest: 512 or 1024"),
    ("batch.global_tokens=512 dataset.packing=false", "only packed rows have a fixed number of tokens"),
    ("train.precision=fp16", "loss scaling needs CUDA"),
    ("dataset.max_length=5000", "the model was made for 4096 positions"),
    ("strategy=fsdp2 launcher.procs=8 strategy.replicas=3", "does not divide the 8 ranks; these do: 1, 2, 4, 8"),
    ("strategy=fsdp2 strategy.replicas=2 launcher=torchrun launcher.procs=1 launcher.nodes=2:4",
     "with 3 machines of launcher.nodes: strategy.replicas=2: does not divide the 3 ranks"),
    ("strategy=zero3 strategy.zero_hpz_partition_size=3", "does not divide the 2 ranks"),
    ("strategy=zero3 strategy.zero_quantized_weights=true", "needs CUDA"),
    ("device_memory_gb=0.001", "strategy=auto: none fits 0.0 GiB a rank with a micro-batch of 1: ddp needs"),
    ("model=hf", "model.path is needed with model=hf"),
    ("model=hf model.path=/nowhere/x", "no such folder"),
    ("model=hf model.path=someone/nothing", "its config.json is not on this machine"),
    ("dataset=files", "dataset.path: not given; name a file"),
    ("dataset=files dataset.path=/nowhere.jsonl", "dataset.path=/nowhere.jsonl: no such file"),
    ("dataset=files dataset.path=[]", "dataset.path: an empty list"),
    ("dataset=files dataset.path={a:1}", "dataset.path={'a': 1}: not a text and not a list"),
])  # fmt: skip
def test_refused_by_the_plan(typed: str, said: str, monkeypatch) -> None:
    monkeypatch.setattr("dtrain.plan.propose.look", lambda: _no_gpu())
    with pytest.raises(UserError) as caught:
        propose(typed.split(" "), None)
    assert said in str(caught.value)


def test_plan_problems_at_once() -> None:
    typed = ["strategy=fsdp2", "launcher.procs=8", "strategy.replicas=3", "train.precision=fp16", "device=cpu",
             "dataset.max_length=5000", "batch.global_tokens=3"]  # fmt: skip
    with pytest.raises(UserError) as caught:
        propose(typed, None)
    assert len(str(caught.value).splitlines()) == 4


def test_a_secret_is_not_taken(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh-12345678")
    for typed in ("run.dir=${oc.env:HF_TOKEN}", "tracker.wandb.tags=[a,x-abcdefgh-12345678]"):
        with pytest.raises(ConfigError) as caught:
            configure([typed], None)
        assert "looks like a secret" in str(caught.value)
        assert "abcdefgh" not in str(caught.value)


def _no_gpu():
    from dtrain.plan.machine import Machine

    return Machine(cores=2, memory_bytes=16 * 2**30, gpus=0, gpu_name="", gpu_memory_bytes=0)
