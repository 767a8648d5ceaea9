"""In processes of their own: wandb keeps state, and a helper process, for as long as Python lives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.trackers.wandb import Wandb, logged_in, names, run_id
from tests.unit.trackers.reports import eval_report, step_report

KEY = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import os, sys, threading
from pathlib import Path
from dtrain.trackers.base import Confusion
from dtrain.trackers.fan_out import FanOut
from dtrain.trackers.jsonl import Jsonl
from dtrain.trackers.wandb import Wandb, _Wandb
from dtrain.trackers.console import Console
from tests.unit.trackers.reports import eval_report, samples_report, step_report

run_dir = Path(sys.argv[1])
config = {"model": {"hub_token": "hunter2hunter2", "name": "tiny"}}
trackers = FanOut([spec.build(run_dir, config, sys.stdout) for spec in (Console(), Wandb(mode=sys.argv[2]))])
told, plain = threading.Event(), _Wandb._open

def open_late(self):
    told.wait()
    return plain(self)

_Wandb._open = open_late  # what is told waits for nothing that wandb does
for tell in [lambda: trackers.start(steps=3, first_step=int(os.environ.get("FIRST_STEP", "0")), lines=[])] + [
    lambda step=step: trackers.step(step_report(step, extras={"aux": 1.0})) for step in (1, 2, 3)
] + [lambda: trackers.eval(eval_report(3, confusion=Confusion(["no", "yes"], [[3, 1], [0, 4]]))),
     lambda: trackers.samples(samples_report(3))]:
    tell()
told.set()
trackers.finish(outcome="done")
"""


def track(run_dir: Path, mode: str = "auto", **env: str) -> subprocess.CompletedProcess[str]:
    run_dir.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-c", CODE, str(run_dir), mode, "hub_token=argvsecret99"],
        env={**clean, "PYTHONPATH": root, "HOME": str(run_dir.parent), "HF_TOKEN": "envsecret12345", **env},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_without_a_key_it_writes_to_disk_says_nothing_and_no_secret(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for first_step in (0, 2):  # the second is the resumed one
        done = track(run_dir, FIRST_STEP=str(first_step))
        assert (done.returncode, done.stderr) == (0, "")
        assert "wandb" not in done.stdout
    identity = (run_dir / "wandb" / "id").read_text().strip()
    files = list(run_dir.rglob("*.wandb"))
    assert [path.stem for path in files] == [f"run-{identity}"] * 2
    tables = [json.loads(path.read_text()) for path in run_dir.rglob("*.table.json")]
    assert [table["data"][1] for table in tables] == [["c" * 80, "d", "length", 9]] * 2
    pictures = list(run_dir.rglob("media/images/eval/confusion*.png"))
    assert len(pictures) == 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    written = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"train/loss" in written
    assert b"eval/loss" in written
    assert b"train/aux" in written
    assert b"hub_token" in written
    for secret in (b"hunter2", b"envsecret", b"argvsecret"):
        assert secret not in written


def test_a_server_that_never_answers_costs_seconds_at_the_end_only(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        done = track(tmp_path / "run", WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 60
    assert done.returncode == 0
    assert "does not answer (timed out); writing to the run folder, for `wandb sync` later" in done.stdout
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"train/loss" in written
    assert KEY.encode() not in written


def test_online_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    done = track(tmp_path / "run", "online")
    assert done.returncode == 0
    assert "set WANDB_API_KEY or run `wandb login`" in done.stdout


def test_a_folder_that_takes_no_files_ends_the_tracker_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "wandb").write_text("in the way")
    done = track(run_dir)
    assert done.returncode == 0
    assert "wandb: stopped: " in done.stdout
    assert "done at step 3" in done.stdout


def test_names_are_grouped() -> None:
    assert names(step_report(1, mfu=0.5, extras={"aux": 1.0})).keys() == {
        "train/loss", "train/grad_norm", "train/lr", "train/aux", "perf/tokens_per_s", "perf/step_s", "perf/mfu",
        "perf/mem_bytes", "data/data_s", "data/epoch", "data/samples", "data/tokens", "data/num_targets",
    }  # fmt: skip
    assert names(eval_report(1)).keys() == {"eval/loss", "eval/num_targets", "eval/eval_s"}


def test_logged_in(tmp_path: Path) -> None:
    url = "https://api.wandb.ai"
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert logged_in(url, {"NETRC": str(netrc)})
    assert logged_in("https://api.forge.coreweave.com", {"NETRC": str(netrc)})
    assert not logged_in("https://wandb.example.org", {"NETRC": str(netrc)})
    assert not logged_in(url, {"NETRC": str(tmp_path / "none")})
    assert logged_in(url, {"WANDB_API_KEY": KEY})


def test_the_id_is_made_once(tmp_path: Path) -> None:
    first = run_id(tmp_path, 0)
    assert run_id(tmp_path, 5) == first, "a resumed run goes on"
    assert run_id(tmp_path, 0) != first, "one that starts over is another"
    assert run_id(tmp_path / "other", 5) != first


def test_values() -> None:
    assert Wandb(tags=["a"]).tags == ("a",)
    with pytest.raises(ValueError, match="mode"):
        Wandb(mode="sometimes")
