"""Manifests of Kubernetes, as data; and that data as YAML that every reader takes for the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.launchers.k8s import AGAIN, LEAD, plain

if TYPE_CHECKING:
    from dtrain.launchers.k8s import K8s

LONGEST = 40
"""Of a name: the names of jobs, services and pods are made of it, which may have 63 characters."""
ENDING_S = 30
"""After the ranks have saved: what the launcher gets to end and to write down how it ended."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
"""What some readers of YAML take for something else than text."""


def name_of(run: str) -> str:
    """A name that Kubernetes accepts, of a run's; two of these differ where the runs' do."""
    clean = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if clean == run and clean[0].isalpha() and len(clean) <= LONGEST:
        return clean
    digest = hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{f'run-{clean}'[: LONGEST - 9].rstrip('-')}-{digest}"


def manifest(launcher: K8s, name: str, command: Sequence[str]) -> dict[str, Any]:
    """What to create in the cluster: on each of the nodes a pod that runs `command`."""
    made = _jobset(launcher, name, command) if launcher.kind == "jobset" else _pytorchjob(launcher, name, command)
    head = {"name": name, "namespace": launcher.namespace, "labels": dict(launcher.labels),
            "annotations": dict(launcher.annotations)}  # fmt: skip
    return dict(plain({**made, "metadata": head, "spec": made["spec"]}))


def _jobset(launcher: K8s, name: str, command: Sequence[str]) -> dict[str, Any]:
    """A pod that was told to go is made again beside the others, and does not count. What dtrain has ended for good
    ends it all; of what else may end a pod, all are started anew, `max_restarts` times.
    """
    codes = {"containerName": "dtrain", "operator": "In"}
    rules = [
        {"action": "FailJob", "onExitCodes": {**codes, "values": [2, 3]}},
        {"action": "Ignore", "onExitCodes": {**codes, "values": [AGAIN["jobset"]]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "completions": launcher.nodes, "parallelism": launcher.nodes, "completionMode": "Indexed", "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": _pod(launcher, command, "dtrain", f"{name}-node-0-0.{name}", restart="Never"),
    }  # fmt: skip
    ended = {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
        "spec": {
            # Names for the pods, by a service without an address of its own; before they are ready, since they wait.
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": launcher.max_restarts, "rules": [ended]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }  # fmt: skip


def _pytorchjob(launcher: K8s, name: str, command: Sequence[str]) -> dict[str, Any]:
    """A pod that ends with a code from 128 on is made again, however often."""
    pod = _pod(launcher, command, "pytorch", f"{name}-master-0", restart=None)
    kinds = {"Master": 1, "Worker": launcher.nodes - 1}
    replicas = {kind: {"replicas": num, "restartPolicy": "ExitCode", "template": pod}
                for kind, num in kinds.items() if num}  # fmt: skip
    return {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob",
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas},
    }  # fmt: skip


def _pod(launcher: K8s, command: Sequence[str], container: str, lead: str, *, restart: str | None) -> dict[str, Any]:
    env: list[dict[str, Any]] = [{"name": LEAD, "value": lead}]
    env += [{"name": key, "value": literal(value)} for key, value in launcher.env.items()]
    for one in launcher.env_from:
        variable, _, where = one.partition("=")
        secret, _, key = where.partition("/")
        env.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    amounts = {"cpu": launcher.cpu, "memory": launcher.memory, **launcher.resources}
    if launcher.gpus_per_node:
        amounts[launcher.gpu] = str(launcher.gpus_per_node)
    user = launcher.user
    inside = {
        "name": container, "image": launcher.image, "workingDir": launcher.mount,
        "command": [literal(word) for word in command], "env": env,
        "resources": {"requests": amounts, "limits": amounts},
        "ports": [{"name": "meeting", "containerPort": launcher.port}],
        # Not of the pod: Kubeflow puts a container of its own before ours, whose image may start as root.
        "securityContext": {"runAsNonRoot": True, "allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "work", "mountPath": launcher.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    return {
        "metadata": {"labels": dict(launcher.labels), "annotations": dict(launcher.annotations)},
        "spec": {
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": launcher.grace_s + ENDING_S,
            "serviceAccountName": launcher.service_account,
            "imagePullSecrets": [{"name": one} for one in launcher.pull_with],
            "nodeSelector": dict(launcher.node_selector),
            "tolerations": [dict(one) for one in launcher.tolerations],
            "securityContext": {"runAsUser": user, "runAsGroup": user, "fsGroup": user,
                                # Else all files of the volume change hands at each start, which takes long.
                                "fsGroupChangePolicy": "OnRootMismatch" if user else None},
            "containers": [inside],
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": launcher.claim}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": launcher.shm}},
            ],
        },
    }  # fmt: skip


def literal(text: str) -> str:
    """As Kubernetes is to be told it, which puts variables where $(NAME) stands in a command or a value."""
    return text.replace("$", "$$")


def to_yaml(data: Mapping[str, Any]) -> str:
    """With every text in quotes that any reader of any version of YAML could take for something else."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_text(self, text: str) -> yaml.ScalarNode:
            sure = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if sure else '"')

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(str, Dumper.represent_text)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, width=float("inf")))
