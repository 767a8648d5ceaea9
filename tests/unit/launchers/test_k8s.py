"""What launcher=k8s renders: valid by schemas, the same for every reader of YAML, and what a pod then does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import cli
from dtrain.config.spec import Gathering, Job
from dtrain.errors import PlanError
from dtrain.launchers._k8s import name_of
from dtrain.launchers.k8s import K8s
from dtrain.plan.world import Topology
from tests.unit.launchers.test_slurm import LOGIN, NODE
from tests.unit.launchers.test_torchrun import MEETING, NASTY

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"
SITE = {
    "nodes": 4, "gpus_per_node": 8, "cpu": "64", "memory": "500Gi", "resources": {"rdma/ib": "1"}, "namespace": "team-a",
    "node_selector": {"pool": "h100"}, "tolerations": ({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},),
    "labels": {"kueue.x-k8s.io/queue-name": "team"}, "annotations": {"example.com/note": "what: they 'say' #1"},
    "env": {"NCCL_DEBUG": "INFO"}, "env_from": ("HF_TOKEN=hub/token",), "pull_with": ("pull",), "service_account": "train",
    "max_restarts": 2,
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])


@pytest.fixture(autouse=True)
def _no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DTRAIN_LEAD", "JOB_COMPLETION_INDEX", "RANK"):
        monkeypatch.delenv(name, raising=False)


def k8s(**values: Any) -> K8s:
    return K8s(**{"image": "example.org/dtrain:1", "claim": "shared", **values})


def job(run_dir: str = "/runs/first", words: tuple[str, ...] = ("launch", "run.name=first"), **values: Any) -> Job:
    made = k8s(**values).job(Path(run_dir), words)
    assert made is not None
    return made


def read(made: Job) -> dict[str, Any]:
    return dict(yaml.safe_load(made.script))


def templates(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the pods."""
    if data["kind"] == "JobSet":
        return [data["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]]
    return [one["template"] for one in data["spec"]["pytorchReplicaSpecs"].values()]


def container(data: dict[str, Any]) -> dict[str, Any]:
    return dict(templates(data)[0]["spec"]["containers"][0])


def check(data: dict[str, Any]) -> None:
    """By our schema of what is around, and by Kubernetes' own of the jobs and pods in it."""
    jsonschema.validate(data, json.loads((SCHEMAS / f"{data['kind'].lower()}.json").read_text()))
    head = {"metadata": {"name": "x"}}
    for one in data["spec"].get("replicatedJobs", []):
        whole = {"apiVersion": "batch/v1", "kind": "Job", **head, **one["template"]}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    for one in templates(data):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **head, **one}, KUBERNETES, strict=True)


@KINDS
@pytest.mark.parametrize("values", [{}, {"nodes": 3, "user": None}, SITE], ids=["least", "nodes", "site"])
def test_the_manifest_is_valid(kind: str, values: dict[str, Any]) -> None:
    assert k8s(kind=kind, **values).problems() == []
    check(read(job(kind=kind, **values)))


def test_the_check_can_fail() -> None:
    data = read(job())
    container(data)["volumeMounts"][0]["path"] = "/x"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(data)
    data = read(job())
    data["spec"]["failurePolicy"]["restarts"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check(data)


@KINDS
def test_what_a_site_asks_for_stands_in_it(kind: str) -> None:
    data = read(job(kind=kind, grace_s=100, **SITE))
    pod, inside = templates(data)[0]["spec"], container(data)
    amounts = {"cpu": "64", "memory": "500Gi", "rdma/ib": "1", "nvidia.com/gpu": "8"}
    assert inside["resources"] == {"requests": amounts, "limits": amounts}
    assert inside["image"] == "example.org/dtrain:1"
    assert inside["command"] == ["python3", "-u", "-m", "dtrain", "launch", "run.name=first"]
    env = {one["name"]: one.get("value", one.get("valueFrom")) for one in inside["env"]}
    assert env["NCCL_DEBUG"] == "INFO"
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert {one["mountPath"] for one in inside["volumeMounts"]} == {"/work", "/dev/shm"}
    assert pod["terminationGracePeriodSeconds"] == 130, "what saving may take, and half a minute to end"
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert inside["securityContext"]["runAsNonRoot"] is True
    assert (
        data["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"} == templates(data)[0]["metadata"]["labels"]
    )
    assert data["metadata"]["namespace"] == "team-a"


def test_only_our_container_must_not_be_root() -> None:
    """Kubeflow puts one before it whose image starts as root, unless the pod says who it runs as."""
    pod = templates(read(job(kind="pytorchjob", nodes=2, user=None)))[0]["spec"]
    assert "securityContext" not in pod
    assert pod["containers"][0]["securityContext"]["runAsNonRoot"] is True


def test_who_starts_what_again_in_a_jobset() -> None:
    data = read(job(nodes=4, max_restarts=2))
    inner = data["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (inner["completions"], inner["parallelism"], inner["backoffLimit"]) == (4, 4, 0)
    rules = inner["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {2: "FailJob", 3: "FailJob", 75: "Ignore"}
    assert rules[-1] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
        container(data)["name"]
    }
    assert data["spec"]["failurePolicy"] == {"maxRestarts": 2, "rules": [
        {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}  # fmt: skip
    lead = container(data)["env"][0]
    assert lead == {"name": "DTRAIN_LEAD", "value": "first-node-0-0.first"}, (
        "job and pod 0 of replicatedJobs[0], by the service"
    )
    assert data["spec"]["network"]["subdomain"] == "first"


def test_who_leads_a_pytorchjob() -> None:
    data = read(job(kind="pytorchjob", nodes=3))
    replicas = data["spec"]["pytorchReplicaSpecs"]
    assert {name: (one["replicas"], one["restartPolicy"]) for name, one in replicas.items()} == {
        "Master": (1, "ExitCode"), "Worker": (2, "ExitCode")}  # fmt: skip
    assert container(data)["name"] == "pytorch", "Kubeflow looks for this name"
    assert container(data)["env"][0]["value"] == "first-master-0"
    assert "Worker" not in read(job(kind="pytorchjob"))["spec"]["pytorchReplicaSpecs"]


@pytest.mark.parametrize(("kind", "index", "code"), [("jobset", "JOB_COMPLETION_INDEX", 75), ("pytorchjob", "RANK", 143)])  # fmt: skip
def test_in_its_pod_it_starts_ranks(kind: str, index: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = k8s(kind=kind, nodes=2, gpus_per_node=8, max_restarts=3)
    assert launcher.restarts().code is None
    assert launcher.machine(LOGIN).gpus == 8
    assert launcher.topology("cuda", launcher.machine(LOGIN)) == Topology(2, 8)
    monkeypatch.setenv("DTRAIN_LEAD", "first-0.first")
    monkeypatch.setenv(index, "1")
    assert launcher.job(Path("/r"), ["launch"]) is None
    assert launcher.gathering() == Gathering(leads=False, host="first-0.first", port=29400, timeout_s=1800)
    assert launcher.machine(NODE) == NODE
    assert (launcher.restarts().most, launcher.restarts().code) == (3, code)
    argv = launcher.command(Path("/r"), ["worker"], Topology(2, 8), MEETING).argv
    assert "--nnodes=2" in argv
    monkeypatch.setenv(index, "0")
    assert launcher.gathering().leads
    with pytest.raises(PlanError, match="no GPU is visible"):
        launcher.topology("cuda", LOGIN)


def expanded(text: str) -> str:
    """What Kubernetes makes of a word of a command: $$ is $, and $(NAME) a variable."""
    return re.sub(r"\$\$|\$\([A-Za-z_]\w*\)", lambda found: "$" if found[0] == "$$" else "EXPANDED", text)


WORDS_OF_YAML = st.sampled_from(["yes", "NO", "off", "null", "~", "1e3", "0o17", "0x1f", "1_000", "12:30:45", "2026-01-01", ".inf", "=", "<<",
                                 "", "- a", "a: b", "a #b", "*x", "&x", "!x", "%x", "@x", "`x`", "{a", "[a", "x\u2028y", "\ufeff", "\x85", "$(HF_TOKEN)",
                                 "$$(X)", "$$$", "'''", '"""', "---", "...", "|", ">", "\t", "\r\n", "😀"])  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(words=st.lists(NASTY | WORDS_OF_YAML, min_size=1, max_size=4), value=NASTY | WORDS_OF_YAML, note=NASTY | WORDS_OF_YAML, run=NASTY,
       kind=st.sampled_from(["jobset", "pytorchjob"]))  # fmt: skip
def test_nothing_typed_becomes_anything_else(words: list[str], value: str, note: str, run: str, kind: str) -> None:
    """Neither for a reader of YAML, nor for Kubernetes, which puts variables into commands; and no shell is there."""
    made = job(f"/runs/{run}", ("launch", *words), kind=kind, env={"X": value}, annotations={"note": note})
    data = read(made)
    assert [expanded(word) for word in container(data)["command"]] == [
        "python3",
        "-u",
        "-m",
        "dtrain",
        "launch",
        *words,
    ]
    assert expanded({one["name"]: one["value"] for one in container(data)["env"]}["X"]) == value
    assert data["metadata"]["annotations"]["note"] == note
    assert made.script.isascii()
    for node in scalars(yaml.compose(made.script)):
        kind_of = node.tag.rpartition(":")[2]
        if node.style != '"' and kind_of == "str":
            assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", node.value), node.value
            assert node.value.lower() not in ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def scalars(node: Any) -> list[Any]:
    if isinstance(node, yaml.ScalarNode):
        return [node]
    children = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    return [one for child in children for one in scalars(child)]


@settings(max_examples=100, deadline=None)
@given(first=NASTY, second=NASTY)
def test_names_differ_where_the_runs_do(first: str, second: str) -> None:
    for name in (name_of(first), name_of(second)):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name)
    assert (name_of(first) == name_of(second)) == (first == second)


def test_a_name_that_kubernetes_takes_is_kept() -> None:
    assert name_of("first-7b") == "first-7b"
    assert name_of("First 7B") != name_of("first-7b")
    assert name_of("x" * 300).startswith("run-xxx")


@pytest.mark.parametrize(("values", "says"), [
    ({"image": "a b"}, "launcher.image='a b'"), ({"image": "$(x)"}, "launcher.image"), ({"claim": "A"}, "launcher.claim='A'"),
    ({"namespace": "a.b"}, "launcher.namespace"), ({"memory": "lots"}, "launcher.memory='lots': not a quantity"),
    ({"mount": "work"}, "launcher.mount='work'"), ({"mount": "/"}, "launcher.mount='/'"), ({"env": {"HF_TOKEN": "x"}}, "env_from=[HF_TOKEN=SECRET/KEY]"),
    ({"env": {"A B": "x"}}, "launcher.env: 'A B'"), ({"env_from": ("hf_abc",)}, "launcher.env_from: 'hf_abc'"),
    ({"labels": {"a b": "x"}}, "launcher.labels: 'a b'"), ({"labels": {"a": "x y"}}, "launcher.labels.a='x y'"),
    ({"resources": {"rdma/ib": "some"}}, "launcher.resources.rdma/ib='some'"), ({"tolerations": ({"taint": "x"},)}, "launcher.tolerations: 'taint'"),
    ({"tolerations": ({"key": "x", "value": True},)}, "launcher.tolerations: value: True: not a str"),
    ({"memory": "500K"}, "launcher.memory='500K': not a quantity"), ({"mount": "/dev/shm"}, "launcher.mount='/dev/shm'"),
    ({"gpu": "gpu"}, "launcher.gpu='gpu': not a resource"), ({"resources": {"fpga": "1"}}, "launcher.resources: 'fpga': not a resource"),
    ({"resources": {"rdma/ib": "0.5"}}, "launcher.resources.rdma/ib='0.5': not a whole number"),
    ({"cpu": "4", "resources": {"cpu": "8"}}, "cpu: is said by launcher.cpu"),
    ({"gpus_per_node": 8, "resources": {"nvidia.com/gpu": "4"}}, "nvidia.com/gpu: is said by launcher.gpus_per_node"),
    ({"tolerations": ({"key": "x", "operator": "exists"},)}, "launcher.tolerations: operator: exists: there are Exists, Equal, Lt, Gt"),
    ({"tolerations": ({"key": "x", "effect": "NoRun"},)}, "launcher.tolerations: effect: NoRun"),
    ({"tolerations": ({"key": "x", "operator": "Exists", "value": "y"},)}, "launcher.tolerations: value: y"),
    ({"tolerations": ({"effect": "NoSchedule"},)}, "launcher.tolerations: key: not given"),
    ({"tolerations": ({"key": "x", "tolerationSeconds": 9},)}, "launcher.tolerations: tolerationSeconds"),
    ({"env": {"A": "x"}, "env_from": ("A=b/c",)}, "launcher.env: A: given more than once"),
    ({"env": {"DTRAIN_LEAD": "x"}}, "launcher.env: DTRAIN_LEAD"), ({"env": {"JOB_COMPLETION_INDEX": "0"}}, "launcher.env: JOB_COMPLETION_INDEX"),
    ({"gpus_per_node": 2, "procs": 4}, "launcher.procs=4"), ({"pull_with": ("A/b",)}, "launcher.pull_with: 'A/b'"),
])  # fmt: skip
def test_what_kubernetes_would_refuse_is_refused_before(values: dict[str, Any], says: str) -> None:
    assert [problem for problem in k8s(**values).problems() if says in problem]


def test_what_is_to_be_filled_in_is_said_once() -> None:
    said = k8s(image="???", claim="???").problems()
    assert [line.split(";")[0] for line in said] == ["launcher.image: not given", "launcher.claim: not given"]


KUBECTL = """\
#!/bin/sh
printf '%s\\0' "$@" >"$KUBECTL_GOT"
echo jobset.jobset.x-k8s.io/a-b
"""
TYPED = ["launch", "model=tiny", "launcher=k8s", "launcher.image=dtrain:cpu", "launcher.claim=shared", "launcher.nodes=2", "run.name=a b"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "it's $(touch x)"
    (made / "bin").mkdir(parents=True)
    monkeypatch.chdir(made)
    monkeypatch.setenv("PATH", str(made / "bin"))
    monkeypatch.setenv("KUBECTL_GOT", str(made / "got"))
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    return made


def test_it_is_handed_to_kubectl(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubectl = place / "bin" / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    assert cli.run([*TYPED, "launcher.namespace=team"]) == 0
    manifest = place / "runs" / "a b" / "job.yaml"
    assert (place / "got").read_text().split("\0")[:-1] == [
        "create", "--namespace=team", "--output=name", "-f", str(manifest)]  # fmt: skip
    check(yaml.safe_load(manifest.read_text()))
    said = capsys.readouterr().out
    assert "ranks      2 on cpu: 2 nodes x 1" in said
    assert "submitted  job jobset.jobset.x-k8s.io/a-b" in said
    assert "kubectl delete --namespace=team jobset.jobset.x-k8s.io/a-b" in said
    text = "".join(path.read_text() for path in place.rglob("*") if path.is_file())
    assert "a-very-secret-value" not in text
    assert not (place / "x").exists()


def test_without_kubectl_it_says_what_to_type(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(TYPED) == 0
    said = capsys.readouterr().out
    assert "kubectl is not found here" in said
    assert "kubectl create --output=name -f " in said
    assert (place / "runs" / "a b" / "job.yaml").is_file()


def test_dry_run_shows_it_and_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*TYPED, "--dry-run"]) == 0
    said = capsys.readouterr().out
    check(yaml.safe_load(said[said.index("apiVersion") :]))
    assert not (place / "runs").exists()
    assert os.listdir(place) == ["bin"]
