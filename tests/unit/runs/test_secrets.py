from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.runs import RunDir, record_failure, redact, redact_config, scrub
from dtrain.runs.secrets import is_secret


@pytest.mark.parametrize("key", ["hub_token", "token", "HF_TOKEN", "tracker.wandb.api_key", "apiKey", "db.password",
                                 "client_secret", "aws_secret_access_key"])  # fmt: skip
def test_secret_keys(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", ["tokens", "num_tokens", "tokenizer", "eos_token", "text_key", "key", "keyboard",
                                 "global_tokens", "tokens_per_s", "token_id", "monkey"])  # fmt: skip
def test_ordinary_keys(key: str) -> None:
    assert not is_secret(key)


def test_a_command_line() -> None:
    env = {"MY_API_KEY": "abcdefgh1234", "NOT_ONE": "batch.size=8", "OTHER_TOKEN": "short"}
    argv = ["dtrain", "launch", "+hub_token=hunter2", "--password", "p4ss", "--token=x", "a=abcdefgh1234", "b=short",
            "eos_token=</s>", "url=https://me:pw@host/x", "batch.size=8", "hf_abcdefghijklmnopqrstuvwx"]  # fmt: skip
    assert redact(argv, env) == [
        "dtrain", "launch", "+hub_token=***", "--password", "***", "--token=***", "a=***", "b=short",
        "eos_token=</s>", "url=https://***@host/x", "batch.size=8", "***",
    ]  # fmt: skip


def test_a_config_at_any_depth() -> None:
    config = {
        "model": {"hub_token": "hunter2", "eos_token": "</s>", "list": [{"password": "x"}], "n": 3, "api_key": None}
    }
    assert redact_config(config, {}) == {
        "model": {"hub_token": "***", "eos_token": "</s>", "list": [{"password": "***"}], "n": 3, "api_key": None}
    }
    assert scrub({"n": 1, "x": None}, {}) == {"n": 1, "x": None}


def test_nothing_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'hunter2"hunter2'  # quotes: JSON would escape them
    monkeypatch.setenv("HF_TOKEN", secret)
    run = RunDir(tmp_path)
    run.write_manifest({"command": ["x", f"y={secret}"]})
    run.add_attempt(0, note=secret)
    run.event("start", argv=[secret])
    try:
        raise ValueError(f"401 for {secret}")
    except ValueError as error:
        record_failure(run, 0, 0, error, phase="build")
    run.write_outcome("worker", 0, message=secret, failure=run.first_failure(0))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert [path for path in files if "hunter2" in path.read_text()] == []
