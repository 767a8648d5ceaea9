"""The main job through the real command: from a file of texts to a model that transformers loads."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dtrain.cli import run as here
from dtrain.config.compose import group_choice
from tests.e2e.command import ROOT, SMALL, dtrain, rows, workers_of, write_chats, write_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left processes in /proc"),
]

KEYS = ["step", "loss", "grad_norm", "lr", "num_targets", "tokens", "tokens_per_s", "step_s", "data_s", "mfu", "mem_bytes",
        "epoch", "samples"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a space and a letter beyond ASCII in its name."""
    path = tmp_path_factory.mktemp("e2e") / "a folder, für alle"
    path.mkdir()
    write_texts(path / "texts.jsonl")
    write_chats(path / "chats.jsonl")
    return path


@pytest.fixture(scope="module")
def zero3(folder: Path):
    """What the main job says."""
    return dtrain(folder, "launch", "+strategy=zero3", "launcher.procs=2", "run.name=main", "dataset.path=texts.jsonl",
                  "checkpoint.every_steps=4", *SMALL)  # fmt: skip


def test_it_is_done(folder: Path, zero3) -> None:
    assert zero3.returncode == 0, zero3.stdout + zero3.stderr
    assert zero3.stderr == ""
    for line in ("strategy   zero3, fp32", "objective: pretrain", "300 read", "done:"):
        assert line in zero3.stdout
    run = folder / "runs" / "main"
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "manifest.json", "events.jsonl", "outcome.json", "metrics.jsonl", "eval.jsonl", "loss.png",
            "logs/attempt-0/rank-0.log", "logs/attempt-0/rank-1.log", "logs/attempt-0/launcher.log",
            "export/config.json", "export/model.safetensors", "export/tokenizer.json"} <= left  # fmt: skip
    assert not [name for name in left if ".tmp" in name or name.endswith((".pt", ".bin", ".pkl"))]
    assert json.loads((run / "outcome.json").read_text())["kind"] == "done"
    assert [event["kind"] for event in rows(run / "events.jsonl")] == [
        "launched",
        "training",
        "saved",
        "saved",
        "ended",
    ]
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["strategy"], manifest["size"], manifest["steps"]) == ("zero3", 2, 8)
    assert workers_of(run) == []


def test_the_metrics(folder: Path, zero3) -> None:
    run = folder / "runs" / "main"
    metrics, manifest = rows(run / "metrics.jsonl"), json.loads((run / "manifest.json").read_text())
    assert [list(row) for row in metrics] == [KEYS] * 8
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert [row["samples"] for row in metrics] == list(range(8, 65, 8))
    assert metrics[-1]["epoch"] == pytest.approx(64 / manifest["data"]["rows"])
    losses = [row["loss"] for row in metrics]
    assert losses[-1] < losses[0] - 1
    assert losses[0] == pytest.approx(np.log(400), abs=0.5)  # a model from nothing is nearly uniform
    # Warm-up over 2 of 8 steps to 5e-3, then half a cosine over the 6 others, down to a tenth.
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    assert [row["lr"] for row in metrics] == pytest.approx([2.5e-3, 5e-3, *(5e-3 * factor for factor in cosine)])
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [4, 8]


def _loss_of(export: Path, run: Path) -> tuple[float, int]:
    """Of transformers alone, on the held-out documents one by one; and the number of targets."""
    import torch
    from transformers import AutoModelForCausalLM

    from dtrain.data.store import RowStore

    model = AutoModelForCausalLM.from_pretrained(export).eval()
    assert model.dtype == torch.float32
    store = RowStore(Path(json.loads((run / "manifest.json").read_text())["data"]["dir"]) / "eval.arrow")
    total, num_targets = 0.0, 0
    for i in range(min(len(store), 64)):
        row, start = store.row(i), 0
        for length in row.lengths.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length].astype(np.int64))
            start += length
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            num_targets += len(ids) - 1
    return total / num_targets, num_targets


def test_the_export_is_the_model(folder: Path, zero3) -> None:
    from transformers import AutoTokenizer

    run = folder / "runs" / "main"
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.decode(tokenizer("Ada sees the sea.").input_ids) == "Ada sees the sea."
    loss, num_targets = _loss_of(run / "export", run)
    last = rows(run / "eval.jsonl")[-1]
    assert num_targets == last["num_targets"]
    assert loss == pytest.approx(last["loss"], abs=1e-5)


def test_eval_finds_the_loss_of_the_runs_own_evals(
    folder: Path, zero3, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    assert here(["eval", "main", "--out", "measured.jsonl"]) == 0
    last = rows(folder / "runs" / "main" / "eval.jsonl")[-1]
    held_out = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("held out"))
    assert int(held_out[3].replace(",", "")) == last["num_targets"]
    assert float(held_out[4]) == pytest.approx(last["loss"], abs=1e-5)
    found = rows(folder / "measured.jsonl")
    assert sum(row["num_targets"] for row in found) == last["num_targets"]
    assert sum(row["loss"] * row["num_targets"] for row in found) / last["num_targets"] == pytest.approx(
        last["loss"], abs=1e-5
    )


def test_a_checkpoint_is_the_model_of_its_step(folder: Path, zero3, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way it has the eval loss of that step; of the last step it is what the run itself exported."""
    monkeypatch.chdir(folder)
    run = folder / "runs" / "main"
    for step in ("4", "8"):
        assert here(["export", "main", "--step", step]) == 0
    early, last = (run / "exports" / f"step-0000000{step}-fp32" for step in (4, 8))
    loss, _ = _loss_of(early, run)
    evals = {row["step"]: row["loss"] for row in rows(run / "eval.jsonl")}
    assert loss == pytest.approx(evals[4], abs=1e-5)
    assert abs(evals[4] - evals[8]) > 1e-2
    files = sorted(path.name for path in (run / "export").iterdir())
    assert sorted(path.name for path in last.iterdir()) == files
    assert all((last / name).read_bytes() == (run / "export" / name).read_bytes() for name in files)


def test_what_is_said_of_its_checkpoints(folder: Path, zero3, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    found = {}
    for verb in ("ls", "show", "verify"):
        assert here(["ckpt", verb, "main"]) == 0
        found[verb] = capsys.readouterr().out
    assert [line.split()[0] for line in found["ls"].splitlines()] == ["step", "8", "4"]
    assert "zero3 x 2" in found["ls"]
    assert "step          8 of 8\n" in found["show"]
    assert "2 of 2 whole" in found["verify"]
    checkpoints = folder / "runs" / "main" / "checkpoints"
    assert here(["ckpt", "diff", str(checkpoints / "step-00000004"), str(checkpoints / "step-00000008")]) == 1
    assert "  step: 4 -> 8\n" in capsys.readouterr().out


def test_what_comes_after(folder: Path, zero3) -> None:
    listed = dtrain(folder, "runs", "ls")
    assert listed.returncode == 0
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:] if line.startswith("main")] == [
        ["main", "done", "8/8"]
    ]
    shown = dtrain(folder, "runs", "show", "main")
    assert shown.returncode == 0
    assert "zero3" in shown.stdout
    assert "eval loss" in shown.stdout
    written = dtrain(folder, "generate", "main", "--prompt", "Ada", "--max-new-tokens", "5")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("Ada")
    exported = dtrain(folder, "export", "main", "--to", "half", "--dtype", "bf16")
    assert exported.returncode == 0, exported.stderr
    import torch
    from safetensors.torch import load_file

    full, half = (
        load_file(path / "model.safetensors") for path in (folder / "runs" / "main" / "export", folder / "half")
    )
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)
    again = dtrain(folder, "export", "main", "--to", "half")
    assert (again.returncode, again.stdout) == (2, "")
    assert "is there already" in again.stderr


READS = """
import sys
from dtrain.cli import run
there, prompt, here = sys.argv[1:]
typed = [["runs", "ls", there], ["runs", "show", f"{there}/main"], ["runs", "tail", f"{there}/main"],
         ["ckpt", "ls", f"{there}/main"], ["ckpt", "verify", f"{there}/main"],
         ["generate", f"{there}/main", "--prompt", prompt, "--max-new-tokens", "2"],
         ["export", f"{there}/main", "--to", f"{here}/mine"],
         ["export", f"{there}/main"], ["ckpt", "prune", f"{there}/main"], ["runs", "stop", f"{there}/main"],
         ["launch", "dataset=files", f"dataset.path={prompt}", f"run.dir='{there}'", "run.name=main", "model=tiny"]]
print("codes", [run(words) for words in typed])
"""


def _without_the_rights_of_root() -> None:
    """Called in a new process: what the modes of files say binds it too."""
    prctl, cap_set_drop = ctypes.CDLL(None).prctl, 24
    for override in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; gone once it runs a program; nobody else has them
        prctl(cap_set_drop, override, 0, 0, 0)


def test_who_may_only_read_a_run_can_do_all_that_reads(folder: Path, zero3, tmp_path: Path) -> None:
    there = shutil.copytree(folder / "runs", tmp_path / "theirs", symlinks=True)
    closed = [there, *there.rglob("*")]
    for path in closed:
        path.chmod(0o555 if path.is_dir() else 0o444, follow_symlinks=True)
    try:
        done = subprocess.run([sys.executable, "-c", READS, there, "texts.jsonl", tmp_path], cwd=folder, text=True,
                              capture_output=True, check=False, preexec_fn=_without_the_rights_of_root,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    finally:
        for path in closed:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert f"codes {[0] * 7 + [2] * 4}" in done.stdout, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for said, whole in zip(("--to", "`run.dir`", "nothing to stop", "`run.dir`"), errors, strict=True):
        assert said in whole


def test_a_run_that_is_done_is_not_written_over(folder: Path, zero3) -> None:
    before = (folder / "runs" / "main" / "metrics.jsonl").read_bytes()
    again = dtrain(folder, "launch", "run.name=main", "dataset.path=texts.jsonl", *SMALL)
    assert again.returncode == 2
    assert "this run is done" in again.stderr
    assert (folder / "runs" / "main" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("strategy", "procs"), [("ddp", 1), ("fsdp2", 2)])
def test_the_same_losses_in_every_form(folder: Path, zero3, strategy: str, procs: int) -> None:
    name = f"{strategy}-{procs}"
    done = dtrain(folder, "launch", f"strategy={strategy}", f"launcher.procs={procs}", f"run.name={name}",
                  "dataset.path=texts.jsonl", "batch.micro_batch=3", *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: reusing" in done.stdout
    for file in ("metrics.jsonl", "eval.jsonl"):
        here, there = (rows(folder / "runs" / run / file) for run in (name, "main"))
        assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], abs=1e-5)
        assert [row["num_targets"] for row in here] == [row["num_targets"] for row in there]


def test_conversations(folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    (folder / "asked.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    done = dtrain(
        folder,
        "launch",
        "strategy=ddp",
        "launcher.procs=1",
        "run.name=chats",
        "dataset.path=chats.jsonl",
        "template=plain",
        'eval.prompts=["Who is number 3?"]',
        "eval.prompts_file=asked.jsonl",
        "eval.chat=true",
        "eval.max_new_tokens=4",
        *SMALL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "objective: sft" in done.stdout
    assert "template: plain, in place of the tokenizer's own" in done.stdout
    for place in ("model", "export"):  # what was trained with is what anybody goes on with
        assert (folder / "runs" / "chats" / place / "chat_template.jinja").read_text() == group_choice(
            "template", "plain"
        )["text"]
    metrics = rows(folder / "runs" / "chats" / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(0 < row["num_targets"] < 0.8 * row["tokens"] for row in metrics)  # what the user asks is not learned
    said = dtrain(folder, "generate", "chats", "--chat", "--prompt", "Who is number 3?", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr
    samples = rows(folder / "runs" / "chats" / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (4, 8) for prompt in ("Who is number 3?", json.dumps(messages))
    ]
    assert samples[2]["text"] == said.stdout.removesuffix("\n")
    assert "samples at step 8  (" in done.stdout


PLUGIN = """
import os
from typing import Literal
from dtrain.config.spec import ObjectiveSpec, spec
from dtrain.objectives.pretrain import Pretrain

@spec
class Faulty(ObjectiveSpec):
    how: Literal["raise", "not_finite"]

    def encode(self, example, tokenizer):
        return Pretrain().encode(example, tokenizer)

    def build(self):
        from dtrain.objectives.base import causal_loss
        calls = 0

        def objective(module, batch):
            nonlocal calls
            calls += 1
            loss = causal_loss(module, batch)
            if calls == 2 and os.environ["RANK"] == "1":
                if self.how == "raise":
                    raise RuntimeError("a fault of the plugin")
                loss.total.data.fill_(float("nan"))
            return loss

        return objective
"""


@pytest.fixture(scope="module")
def faulty(folder: Path):
    """Launch with an objective that goes wrong on rank 1 in the second step."""
    (folder / "dtrain_faulty").mkdir()
    (folder / "dtrain_faulty" / "__init__.py").write_text(PLUGIN)
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / "faulty.yaml").write_text("_target_: dtrain_faulty.Faulty\nhow: ???\n")

    def launch(name: str, how: str, *more: str):
        began = time.monotonic()
        done = dtrain(folder, "launch", "launcher.procs=2", f"run.name={name}", "--config-dir", "conf", "objective=faulty",
                      f"objective.how={how}", "dataset.path=texts.jsonl", *SMALL, *more)  # fmt: skip
        return done, time.monotonic() - began

    return launch


def test_a_rank_that_fails(folder: Path, faulty) -> None:
    done, took_s = faulty("raises", "raise", "plugins=[dtrain_faulty]", "strategy=ddp")
    run = folder / "runs" / "raises"
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rank 1 on ")
    assert "RuntimeError: a fault of the plugin" in last
    assert "logs/attempt-0/rank-1.log" in last
    assert "a fault of the plugin" in (run / "logs" / "attempt-0" / "rank-1.log").read_text()
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["kind"], outcome["exit_code"], outcome["failure"]["rank"]) == ("worker", 3, 1)
    assert len(rows(run / "metrics.jsonl")) == 1
    assert not (run / "export").exists()
    assert workers_of(run) == []
    assert took_s < 120
    assert "failed" in dtrain(folder, "runs", "ls").stdout


def test_a_loss_that_is_not_finite(folder: Path, faulty) -> None:
    done, _ = faulty("nonfinite", "not_finite", "plugins=[dtrain_faulty]", "strategy=zero2")
    run = folder / "runs" / "nonfinite"
    assert done.returncode == 3
    assert "NonFiniteError: the loss is not finite; nothing was updated. rank 1: rows [" in done.stderr
    assert "rank 0: rows" not in done.stderr
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["kind"] == "nonfinite"
    assert len(rows(run / "metrics.jsonl")) == 1
    assert workers_of(run) == []


def test_a_plugin_that_was_not_typed(folder: Path, faulty) -> None:
    done, _ = faulty("untyped", "raise")
    assert done.returncode == 2
    assert "if dtrain_faulty is a package of your own, type plugins=[dtrain_faulty]" in done.stderr
    assert not (folder / "runs" / "untyped").exists()
