"""A user's own groups and choices, and what such a file may not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.compose import choices
from dtrain.errors import ConfigError
from dtrain.plan.propose import configure, propose


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


def test_an_own_choice(tmp_path: Path) -> None:
    _write(tmp_path, "optim/slow.yaml", "_target_: dtrain.optims.adamw.AdamW\nlr: 1.0e-6\n")
    assert "slow" in choices(tmp_path)["optim"]
    assert configure(["optim=slow"], tmp_path)[0].optim.lr == 1e-6


def test_a_choice_that_builds_on_another(tmp_path: Path) -> None:
    _write(tmp_path, "strategy/offload.yaml", "defaults: [zero3, _self_]\noffload_optimizer: cpu\n")
    proposal = propose(["+strategy=offload"], tmp_path)
    assert (proposal.plan.strategy, proposal.config.strategy.offload_optimizer) == ("offload", "cpu")
    assert proposal.plan.memory["offload"].states.host > 0
    assert proposal.plan.memory["zero3"].states.host == 0


def test_an_experiment_that_overrides_groups(tmp_path: Path) -> None:
    _write(tmp_path, "experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /strategy: zero2\n"
           "  - override /tracker: [jsonl]\nrun: {name: mine}\ntrain: {steps: null, epochs: 2}\n")  # fmt: skip
    for typed in ("experiment=mine", "+experiment=mine"):
        config, name = configure([typed], tmp_path)
        assert (name, config.strategy.stage, list(config.tracker), config.run.name) == ("zero2", 2, ["jsonl"], "mine")
        assert (config.train.steps, config.train.epochs) == (None, 2.0)
    assert configure(["experiment=mine", "strategy=zero3", "train.steps=4"], tmp_path)[0].train.steps == 4


def test_a_group_of_ones_own(tmp_path: Path) -> None:
    _write(tmp_path, "size/big.yaml", "# @package _global_\nmodel: {hidden: 640}\n")
    for typed in ("size=big", "+size=big"):
        assert configure([typed], tmp_path)[0].model.hidden == 640


def test_without_the_package_line(tmp_path: Path) -> None:
    _write(tmp_path, "experiment/mine.yaml", "run: {name: mine}\n")
    with pytest.raises(ConfigError, match=r"experiment=mine: .* its first line must be `# @package _global_`"):
        configure(["experiment=mine"], tmp_path)


@pytest.mark.parametrize(("name", "text", "typed", "said"), [
    ("config.yaml", "run: {name: mine}", "run.seed=1", "is never read; put these keys into"),
    ("model/tiny.yaml", "_target_: dtrain.models.tiny.Tiny", "run.seed=1", "dtrain has a choice of this name"),
    ("model/bad.yaml", "a: [", "model=bad", "bad.yaml"),
    ("model/bad.yaml", "- 1\n- 2\n", "model=bad", "model=[1, 2]: choose one of the group"),
    ("model/bad.yaml", "_target_: dtrain.models.tiny.Tiny\nhiden: 3\n", "model=bad", "model.hiden: unknown key; did you mean `hidden`?"),
    ("model/bad.yaml", "_target_: dtrain.models.tiny.Tiny\nhidden: 64\nhidden: 32\n", "model=bad", "hidden"),
    ("model/empty.yaml", "", "model=empty", "model._target_=None: not the name of a spec"),
    ("experiment/bad.yaml", "# @package _global_\ndefaults:\n  - override /model: nope\n", "experiment=bad", "model/nope"),
    ("experiment/bad.yaml", "# @package _global_\ntrain: {stepz: 3}\n", "experiment=bad", "train.stepz: unknown key; did you mean `steps`?"),
    ("experiment/bad.yaml", "# @package _global_\ntrain: {steps: 100, epochs: 3}\n", "experiment=bad", "train.steps=100 and train.epochs=3: one number"),
    ("experiment/bad.yaml", "# @package _global_\nplugins: [os]\n", "experiment=bad", "plugins=[os]: a file asks for these packages"),
])  # fmt: skip
def test_refused(tmp_path: Path, name: str, text: str, typed: str, said: str) -> None:
    _write(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        configure([typed], tmp_path)
    assert said in str(caught.value)


CANARIES = [
    "_target_: os.system\ncommand: touch {canary}\n",
    "_target_: builtins.exec\n",
    "_target_: subprocess.run\nargs: [touch, {canary}]\n",
    "_target_: evil.make.Model\n",
    "!!python/object/apply:os.system ['touch {canary}']\n",
    "_target_: !!python/object/apply:os.system ['touch {canary}']\n",
    "_target_: dtrain.models.tiny.Tiny\nhidden: !!python/object/apply:os.system ['touch {canary}']\n",
    "_target_: dtrain.models.tiny.Tiny\nhidden: ${{eval:'1'}}\n",
]


@pytest.mark.parametrize("text", CANARIES)
def test_a_file_runs_nothing(tmp_path: Path, text: str, monkeypatch) -> None:
    canary = tmp_path / "canary"
    _write(tmp_path, "evil/make.py", f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for group in ("model", "tracker", "strategy"):
        folder = _write(tmp_path / group, f"{group}/evil.yaml", text.format(canary=canary))
        with pytest.raises(ConfigError):
            configure([f"{group}=evil"], folder)
    propose([], tmp_path / "strategy")  # its table passes over what it may not read
    assert not canary.exists()


def test_a_plugin_that_was_typed(tmp_path: Path, monkeypatch) -> None:
    source = ("from dtrain.config.spec import spec\nfrom dtrain.models.tiny import Tiny\nfrom dtrain.config.spec import ModelSpec\n"
              "from typing import Any\n@spec\nclass Mine(ModelSpec):\n    size: int = 3\n    def trained(self): return False\n"
              "    def figures(self): raise NotImplementedError\n    def assets(self, texts, cache): ...\n"
              "    def build(self, assets, *, seed): ...\n")  # fmt: skip
    _write(tmp_path, "dtrain_typed_plugin/__init__.py", "")
    _write(tmp_path, "dtrain_typed_plugin/models.py", source)
    _write(tmp_path, "dtrain_typed_plugin/broken.py", "1 / 0\n")
    conf = _write(tmp_path / "conf", "model/mine.yaml", "_target_: dtrain_typed_plugin.models.Mine\n")
    _write(conf, "model/broken.yaml", "_target_: dtrain_typed_plugin.broken.Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="if dtrain_typed_plugin is a package of your own, type plugins="):
        configure(["model=mine"], conf)
    config, _ = configure(["model=mine", "plugins=[dtrain_typed_plugin]", "model.size=4"], conf)
    assert config.model.size == 4
    assert config.plugins == ("dtrain_typed_plugin",)
    with pytest.raises(ConfigError, match=r"ZeroDivisionError while it was imported: .*broken.py:1"):
        configure(["model=broken", "plugins=[dtrain_typed_plugin]"], conf)
    with pytest.raises(ConfigError, match="model.siz: unknown key; did you mean `size`"):
        configure(["model=mine", "plugins=[dtrain_typed_plugin]", "model.siz=4"], conf)
