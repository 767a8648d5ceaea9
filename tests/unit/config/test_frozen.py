"""What is written is what is read, for every choice that there is."""

from __future__ import annotations

import pytest

from dtrain.config import frozen
from dtrain.config.compose import choices, conf_dir
from dtrain.config.explain import keys, schema_lines
from dtrain.config.spec import GROUPS
from dtrain.errors import ConfigError
from dtrain.plan.propose import configure

RECIPES = ("booking_bot", "continue_pretraining", "identity", "instruct", "medical_qa", "prefer", "sentiment")
NEEDED = {
    "dataset=files": ["dataset.path=somewhere.jsonl"],
    "dataset=hub": ["dataset.name=somebody/something"],
    "dataset=mixture": ["dataset.sources={a:{dataset:stdlib}}"],
    "dataset=python": ["dataset.function=tests.rows:train", "plugins=[tests]"],
    "launcher=deepspeed": ["launcher.hostfile=hosts"],
    "launcher=k8s": ["launcher.image=example.org/dtrain:1", "launcher.claim=runs"],
    "model=hf": ["model.path=someone/something"],
    "model=python": ["model.function=tests.net:make", "plugins=[tests]"],
    **{f"experiment={name}": ["dataset.path=somewhere.jsonl"] for name in RECIPES},
}
CHOICES = [f"{group}={name}" for group, names in choices().items() for name in names]


@pytest.mark.parametrize("typed", CHOICES)
def test_every_choice_there_and_back(typed: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somewhere.jsonl").write_text('{"text": "a"}\n')
    config, _ = configure([typed, *NEEDED.get(typed, [])], None)
    frozen.write(tmp_path / "config.yaml", config)
    again = frozen.read(tmp_path / "config.yaml", plugins=config.plugins)
    assert again == config
    assert frozen.digest(again) == frozen.digest(config)
    assert all(key.doc or "." in key.name for key in keys(config).values())
    assert len(schema_lines(config)) > 20


def test_each_group_has_its_folder() -> None:
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment"}
    assert all(choices().values())


def test_every_file_says_in_a_line_what_it_is() -> None:
    for path in conf_dir().glob("*/*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        about = next(line for line in lines if not line.startswith("# @package"))
        assert about.startswith("# "), path


@pytest.mark.parametrize("text", ["[]", "3", "", "a: 1", "!!python/name:os.system ''"])
def test_a_damaged_file_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        frozen.read(tmp_path / "config.yaml", plugins=())


def test_an_edited_file_is_checked_like_what_is_typed(tmp_path) -> None:
    frozen.write(tmp_path / "config.yaml", configure([], None)[0])
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("grad_clip", "grad_clp"))
    with pytest.raises(ConfigError, match=r"train\.grad_clp: unknown key; did you mean `grad_clip`"):
        frozen.read(tmp_path / "config.yaml", plugins=())
