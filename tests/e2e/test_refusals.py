"""What cannot be done ends with one clear message, exit code 2, and nothing left behind; through the real command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.cli import run
from tests.e2e.command import ROOT, SMALL, dtrain, workers_of, write_chats, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_texts(path / "texts.jsonl")
    write_chats(path / "chats.jsonl", 30)
    return path


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """What is said on stderr; by the command in this process, which reads argv and writes as the real one does."""
    assert run(list(argv)) == code
    said = capsys.readouterr().err
    assert re.match(r"error: |\d+ problems:\n", said)
    assert "Traceback" not in said
    return said


def _runs(here: Path) -> list[str]:
    """Run folders that are there."""
    return [path.name for path in (here / "runs").glob("[!.]*")] if (here / "runs").is_dir() else []


# --- the data and the model


def test_an_empty_dataset(here: Path, capsys) -> None:
    (here / "none.jsonl").write_text("\n\n")
    assert "no rows at all" in _refused(capsys, "launch", *SMALL, "dataset.path=none.jsonl")
    assert _runs(here) == []


def test_fewer_rows_than_a_global_batch(here: Path, capsys) -> None:
    said = _refused(capsys, "launch", *SMALL, "dataset.path=texts.jsonl", "batch.global_batch=5000")
    assert "batch.global_batch=5000: the dataset has only " in said
    assert "use at most" in said
    assert _runs(here) == []


def test_rows_that_are_no_rows(here: Path, capsys) -> None:
    (here / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n\n{"txt": "three"}\n{"text": 5}\n')
    said = _refused(capsys, "launch", *SMALL, "dataset.path=bad.jsonl")
    assert said.splitlines()[0] == "error: dataset: 3 bad rows; repair or remove, or set dataset.on_bad_row=skip:"
    for line in (
        "bad.jsonl:2: not JSON",
        "bad.jsonl:4: no `text`: the rows are read as text (text), and this one has `txt`",
        "bad.jsonl:5: `text` is a number",
    ):
        assert line in said
    assert _runs(here) == []


def _model(here: Path, **tokenizer: object) -> Path:
    """A model folder; without a tokenizer where none is described."""
    from transformers import Qwen2Config

    folder = here / "model"
    Qwen2Config(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, max_position_embeddings=64).save_pretrained(folder)  # fmt: skip
    if tokenizer:
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_model_folders_that_lack_something(here: Path, capsys) -> None:
    small = [one for one in SMALL if not one.startswith("model.")]
    typed = ["launch", *small, "dataset.path=texts.jsonl", "model=hf", "model.path=model"]
    (here / "model").mkdir()
    assert "config.json" in _refused(capsys, *typed)
    _model(here)
    assert "no weights" in _refused(capsys, *typed)
    assert "tokenizer" in _refused(capsys, *typed, "model.from_scratch=true")
    _model(here, eos_token="<eos>")
    assert "model.pad_token is needed" in _refused(capsys, *typed, "model.from_scratch=true")
    assert _runs(here) == []


def test_a_model_that_is_not_there(here: Path, capsys) -> None:
    (here / "qwen-small").mkdir()
    said = _refused(capsys, "launch", "model=hf", "model.path=./qwen-smal")
    assert "no such folder; did you mean qwen-small?" in said


def test_conversations_and_a_tokenizer_without_a_template(here: Path, capsys) -> None:
    _model(here, eos_token="<eos>", pad_token="a")
    small = [one for one in SMALL if not one.startswith("model.")]
    said = _refused(capsys, "launch", *small, "dataset.path=chats.jsonl", "model=hf", "model.path=model",
                    "model.from_scratch=true")  # fmt: skip
    assert "chat template" in said
    assert _runs(here) == []


# --- the run folder


def test_run_dir_is_a_file(here: Path, capsys) -> None:
    (here / "taken").write_text("")
    assert "is not a folder" in _refused(capsys, "launch", *SMALL, "dataset.path=texts.jsonl", "run.dir=taken")
    (here / "runs").mkdir()
    (here / "runs" / "demo").write_text("")
    assert "is not a folder" in _refused(capsys, "launch", *SMALL, "dataset.path=texts.jsonl")


def test_run_dir_cannot_be_written(here: Path, capsys) -> None:
    if os.geteuid() != 0:
        (here / "locked").mkdir(mode=0o500)
        place = here / "locked"
    else:  # permissions do not bind root, /proc does
        place = Path("/proc/self")
    said = _refused(capsys, "launch", *SMALL, "dataset.path=texts.jsonl", f"run.dir={place}/runs")
    assert "cannot write in" in said
    assert "set `run.dir` to a folder that you can write in" in said
    assert not (here / "runs").exists()


def test_the_cache_cannot_be_written(here: Path, capsys) -> None:
    (here / "file").write_text("")
    said = _refused(capsys, "launch", *SMALL, "dataset.path=texts.jsonl", "run.cache=file/cache")
    assert "run.cache=" in said
    assert _runs(here) == []


def test_no_home_and_no_locale(here: Path) -> None:
    env = {"HOME": None, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = dtrain(here, "launch", "--dry-run", *SMALL, "dataset.path=texts.jsonl", "run.dir=für alle", env=env)
    assert done.returncode == 0, done.stderr
    refused = dtrain(here, "launch", *SMALL, "dataset.path=nö.jsonl", env=env)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)


# --- the command line


def test_a_mistake_is_quick_and_without_a_traceback(here: Path) -> None:
    began = time.monotonic()
    done = dtrain(here, "launch", "foo=1", "train.stpes=3", "strategy=zero9")
    assert time.monotonic() - began < 30
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0] == "3 problems:"
    assert [line.startswith("error: ") for line in lines] == [False, True, True, True]


@pytest.mark.parametrize(("argv", "said"), [
    (["lunch"], "lunch: no such verb; did you mean `launch`?"),
    (["plan", "--nope"], "unrecognized arguments: --nope"),
    (["launch", "--config-dir", "/nowhere"], "--config-dir /nowhere: no such folder"),
    (["launch", "--cfg", "hydra"], "invalid choice: 'hydra'"),
    (["config"], "required: show|explain|schema"),
    (["config", "explain", "train.stpes"], "train.stpes: no such key; did you mean `train.steps`?"),
    (["runs", "show", "nope"], "nope: no run of that name or folder"),
    (["runs", "ls", "/nowhere"], "/nowhere: no such folder"),
    (["generate", "nope", "--prompt", "a"], "nope: neither a run nor a folder with config.json"),
    (["export", "nope", "--to", "x"], "nope: no run"),
    (["launch", "-m", "train.steps=interval(1,2)"], "a run is for one value"),
    (["launch", "-m", "train.steps=glob(*)"], "glob() is for groups"),
    (["launch", "-m", "train.steps=a,3"], "train.steps=a: not a whole number"),
    (["launch", "-m", "run.dir='", "foo=1,2"], "2 problems:"),
])  # fmt: skip
def test_refused_words(here: Path, capsys, argv: list[str], said: str) -> None:
    assert said in _refused(capsys, *argv)


def test_options_anywhere(here: Path, capsys) -> None:
    for argv in (["launch", "--dry-run", "strategy=ddp", "train.steps=7"], ["launch", "strategy=ddp", "--dry-run", "train.steps=7"],
                 ["launch", "strategy=ddp", "train.steps=7", "--dry-run"]):  # fmt: skip
        assert run(argv) == 0
        assert "length     7 steps" in capsys.readouterr().out


def test_a_sweep_is_named_by_what_differs(here: Path, capsys) -> None:
    assert (
        run(
            [
                "launch",
                "-m",
                "--dry-run",
                "experiment=smoke",
                "+strategy=ddp,zero1",
                "train.steps=range(3,5)",
                "launcher.procs=1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    for name in ("smoke-strategy=ddp-train.steps=3", "smoke-strategy=zero1-train.steps=4"):
        assert f"run        {name} in runs/{name}" in said
    assert "4 of 4 runs shown" in said
    assert run(["launch", "-m", "--dry-run", "strategy=glob(zero*)", "launcher.procs=1"]) == 0
    assert "demo-strategy=zero3" in capsys.readouterr().out
    assert run(["launch", "-m", "--dry-run", "run.name=a,b", "launcher.procs=1"]) == 0
    assert "run        b in" in capsys.readouterr().out
    assert run(["launch", "-m", "--dry-run", "launcher.procs=1"]) == 0
    assert "run        demo in" in capsys.readouterr().out
    assert (
        run(
            [
                "launch",
                "-m",
                "--dry-run",
                "run.dir=" + ",".join(c * 150 for c in "ab"),
                "optim.lr=1,1",
                "launcher.procs=1",
            ]
        )
        == 0
    )
    assert len({line for line in capsys.readouterr().out.splitlines() if line.startswith("run  ")}) == 4


def test_one_bad_value_of_a_sweep_starts_nothing(here: Path, capsys) -> None:
    said = _refused(capsys, "launch", "-m", *SMALL, "dataset.path=texts.jsonl", "optim.lr=1e-3,abc")
    assert "optim.lr=abc: not a number" in said
    assert _runs(here) == []
    assert not (here / "runs").exists()


def test_what_is_printed_of_a_secret(here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh-12345678")
    said = _refused(capsys, "plan", "optim.lr=${oc.env:HF_TOKEN}", "run.name=abcdefgh-12345678")
    assert "abcdefgh" not in said


# --- processes


def _start(here: Path, *argv: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "dtrain", *argv], cwd=here, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), **env})  # fmt: skip


def _wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_launches_of_one_run(here: Path) -> None:
    typed = ["launch", *SMALL, "dataset.path=texts.jsonl", "launcher.procs=1", "train.steps=100000", "strategy=ddp"]
    first = _start(here, *typed)
    try:
        _wait_for(here / "runs" / "demo" / "metrics.jsonl", first)
        second = dtrain(here, *typed)
        assert second.returncode == 2
        assert f"in use by process {first.pid}" in second.stderr
        assert "give this one its own `run.name`" in second.stderr
        listed = dtrain(here, "runs", "ls")
        assert "running" in listed.stdout
    finally:
        os.kill(first.pid, signal.SIGINT)
        said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert workers_of(here / "runs" / "demo") == []


@pytest.mark.slow
def test_ctrl_c_while_the_data_is_prepared(here: Path) -> None:
    text = (here / "texts.jsonl").read_text()
    (here / "large.jsonl").write_text(text * 1000)
    process = _start(here, "launch", *SMALL, "dataset.path=large.jsonl", "launcher.procs=1")
    _wait_for(here / "runs" / ".cache", process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted" in said
    assert _runs(here) == []
    shutil.rmtree(here / "runs")
    assert not list(here.glob("runs/.cache/data-*/meta.json"))


@pytest.mark.slow
def test_slurms_signal_while_the_data_is_prepared(here: Path) -> None:
    """`scancel --signal=USR1 JOB` sends it to every process of a step: those that tokenise are there too."""
    text = (here / "texts.jsonl").read_text()
    (here / "large.jsonl").write_text(text * 1000)
    run = here / "runs" / "demo"
    run.mkdir(parents=True)
    process = _start(here, "launch", *SMALL, "dataset.path=large.jsonl", "launcher.procs=1", DTRAIN_BATCH="7.0")
    _wait_for(here / "runs" / ".cache", process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == ("SIGUSR1: ended while no rank ran; the same command goes on from what is prepared "
                                     "and saved; the batch script is asked to queue the job again")  # fmt: skip
    assert "Traceback" not in said
    assert (run / "REQUEUE").read_text() == "7.0\n"
    shutil.rmtree(here / "runs")


# --- asserts are for our own mistakes


@pytest.mark.slow
def test_without_asserts_the_same_is_refused(tmp_path: Path) -> None:
    """`python -O` takes asserts away: what a user types is checked all the same."""
    done = subprocess.run([sys.executable, "-O", "-c", _UNDER_O], cwd=ROOT, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 80


_UNDER_O = """
import sys
from dtrain.errors import UserError
from dtrain.plan.propose import configure, propose
from tests.unit.config.test_numbers import CASES, _said
from tests.unit.config.test_refused import REFUSED
assert False, "this is not run"
num = 0
for typed, said in REFUSED:
    try:
        configure([typed] if typed[0] in "=xy" or '"' in typed else typed.split(" "), None)
    except UserError as error:
        if said in str(error) or "{" in typed:  # without asserts Hydra itself reads no {...}, and dtrain says so
            num += 1
            continue
    sys.exit(f"{typed} is not refused under -O")
for path, typed, key in CASES:
    for value in (-1, float("nan"), "abc", True):
        if not _said(path, typed, key, value):
            sys.exit(f"{path}.{key}={value} is not refused under -O")
    num += 1
for typed in (["strategy=fsdp2", "strategy.replicas=3"], ["batch.global_tokens=1000"], ["train.precision=fp16", "device=cpu"]):
    try:
        propose([*typed, "launcher.procs=8"], None)
    except UserError:
        num += 1
    else:
        sys.exit(f"{typed} is not refused under -O")
print(num)
"""
