"""The pods of launcher=k8s, played by processes: each runs what the manifest says, and is made again by its rules."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from dtrain.launchers.k8s import K8s
from dtrain.runs import RunDir
from tests.cluster.slurm import until
from tests.e2e.command import ROOT, SMALL, write_texts

TYPED = [*SMALL, "dataset.path=texts.jsonl", "launcher=k8s", "launcher.image=dtrain:cpu", "launcher.claim=shared", "launcher.nodes=2",
         "strategy=ddp", "eval.every_steps=0", "launcher.join_timeout_s=120", "train.steps=100", "checkpoint.every_minutes=null",
         "run.dir='$(HOSTNAME) x'", "run.name=first"]  # fmt: skip
SLOWLY = "train.forward:sleep=0.2:attempt=0"
"""So that it is not done before it is told to go."""


def pods(folder: Path, spec: dict[str, Any], first: int = 0) -> list[subprocess.Popen[str]]:
    """As the controllers start them, but for the image and the name of the first one, which is this machine. `first`:
    of those that are started.
    """
    job = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    (inside,) = job["template"]["spec"]["containers"]
    env = {one["name"]: one["value"].replace("$$", "$") for one in inside["env"]} | {"DTRAIN_LEAD": "127.0.0.1"}
    command = [word.replace("$$", "$") for word in inside["command"]]
    started = []
    for number in range(first, job["completions"]):
        with (folder / f"pod-{number}.log").open("a") as out:
            started.append(subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DTRAIN_FAIL": SLOWLY, **env,
                     "JOB_COMPLETION_INDEX": str(number)},
            ))  # fmt: skip
    return started


def action(spec: dict[str, Any], code: int) -> str:
    """What Kubernetes does with a pod that ends so."""
    rules = spec["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    return next((rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", [])), "Count")


def test_a_pod_that_is_told_to_go_is_made_again_and_the_run_goes_on(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl")
    launcher = K8s(image="dtrain:cpu", claim="shared", nodes=2, python=sys.executable)
    made = launcher.job(tmp_path / "$(HOSTNAME) x" / "first", ["launch", *TYPED])
    assert made is not None
    spec = yaml.safe_load(made.script)
    run = RunDir(tmp_path / "$(HOSTNAME) x" / "first")
    started = pods(tmp_path, spec, first=1)
    try:
        until(lambda: "waiting for the node that leads" in (tmp_path / "pod-1.log").read_text(), 120)
        started[0].send_signal(signal.SIGTERM)
        assert started[0].wait(120) == 75
        assert "SIGTERM: ended while no rank ran" in (tmp_path / "pod-1.log").read_text()
        assert list(run.nodes.glob("*")) == []
        started = pods(tmp_path, spec)
        until(lambda: run.metrics.exists() or any(one.poll() is not None for one in started), 120)
        started[1].send_signal(signal.SIGTERM)
        said = lambda: "".join(path.read_text() for path in tmp_path.glob("pod-*.log"))  # noqa: E731
        assert [one.wait(120) for one in started] == [75, 75], said()
        assert action(spec, 75) == "Ignore"
        assert action(spec, 2) == action(spec, 3) == "FailJob"
        assert action(spec, 137) == "Count"
        stopped_at = run.read_manifest()["attempts"][0]["first_step"], len(run.metrics.read_text().splitlines())
        started = pods(tmp_path, spec)
        assert [one.wait(120) for one in started] == [0, 0], said()
    finally:
        for one in started:
            one.kill()
            one.wait()
    attempts = run.read_manifest()["attempts"]
    assert [one["ended"] for one in attempts] == ["stopped", "done"]
    assert attempts[1]["first_step"] == stopped_at[1] > 0
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == list(range(1, 101))
