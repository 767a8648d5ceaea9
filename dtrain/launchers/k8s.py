"""Pods of Kubernetes, one on each node: a JobSet or a PyTorchJob, made again when a pod is told to go."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dtrain.config.spec import Command, Gathering, Job, LauncherSpec, Meeting, Restarts, spec
from dtrain.launchers._here import machine_there, procs_here, procs_there, ranks
from dtrain.plan.machine import Machine
from dtrain.plan.world import Device, Topology
from dtrain.runs.outcomes import STOPPED
from dtrain.runs.secrets import is_secret

LEAD = "DTRAIN_LEAD"
"""Set in every pod: the name of the first one."""
INDEX = {"jobset": "JOB_COMPLETION_INDEX", "pytorchjob": "RANK"}
"""What a pod's number is found in, which those that make it set."""
AGAIN = {"jobset": STOPPED, "pytorchjob": 143}
"""The exit code after which a pod is made again. A PyTorchJob takes codes below 128 for the end."""
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_KEY = re.compile(rf"({_DOMAIN.pattern}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?")
_DEVICE = re.compile(rf"(?=[^/]+/){_KEY.pattern}")
"""A resource that is not Kubernetes' own has a domain, and comes in whole pieces."""
_OWN = re.compile(r"ephemeral-storage|hugepages-[0-9]+[KMGT]i")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*(@sha256:[0-9a-f]{64})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FROM = re.compile(rf"{_VARIABLE.pattern}={_DOMAIN.pattern}/[A-Za-z0-9_.-]+")
_ASKED = {"image": "name the one that the pods run, as in launcher.image=example.org/dtrain:1",
          "claim": "name a PersistentVolumeClaim that all nodes can write to, as in launcher.claim=runs"}  # fmt: skip
_TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}
_OPERATORS, _EFFECTS = ("Exists", "Equal", "Lt", "Gt"), ("NoSchedule", "PreferNoSchedule", "NoExecute")


@spec
class K8s(LauncherSpec):
    kind: Literal["jobset", "pytorchjob"] = "jobset"
    """What is made: a JobSet (jobset.x-k8s.io/v1alpha2), or a PyTorchJob of Kubeflow (kubeflow.org/v1)."""
    image: str
    """The image, as docker/ makes them."""
    claim: str
    """A PersistentVolumeClaim that all nodes can write to: run folders, data and the cache lie there."""
    mount: str = "/work"
    """Where it is seen in a pod; what is typed is relative to it."""
    namespace: str | None = None
    """kubectl's own when not given."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods, each on a node."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each pod; 0 is a job on CPU."""
    gpu: str = "nvidia.com/gpu"
    """The resource that a GPU is."""
    procs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes in each pod: one per GPU; on CPU one."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """OMP_NUM_THREADS of each process: the usable cores divided among them, unless the environment says otherwise."""
    cpu: str | None = None
    """Cores of a pod, as 64 or 500m; as much is asked for as may be used."""
    memory: str | None = None
    """Memory of a pod, as 500Gi; the same."""
    shm: str = "16Gi"
    """Size of /dev/shm, which NCCL and loaders use; it counts as memory of the pod."""
    resources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further resources of a pod, as {rdma/ib: 1}."""
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[Mapping[str, str | int | bool], ...] = ()
    """Taints of nodes that do not matter, as Kubernetes writes them."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of what is made and its pods, such as a queue's."""
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of what is made and its pods."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables of the pods; nothing that is secret."""
    env_from: tuple[str, ...] = ()
    """Variables whose values are in secrets of the cluster, each as NAME=SECRET/KEY."""
    pull_with: tuple[str, ...] = ()
    """Secrets to pull the image with."""
    service_account: str | None = None
    user: Annotated[int, Field(ge=1)] | None = 10001
    """The user and group that a pod runs as, and that the volume is made writable for; the image's when null."""
    grace_s: Annotated[int, Field(ge=10)] = 300
    """So long after a pod is told to stop it is killed: enough for a step and a save."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often in a row a run that failed is started again: never for what the user typed, nor without progress."""
    restart_wait_s: Annotated[float, Field(ge=0)] = 10.0
    """Before the first of them; doubled each time, up to ten minutes."""
    prepare: Literal["submit", "job"] = "job"
    """Where data and model are fetched and prepared: in the job, or before it is handed over, for which this machine
    must see the volume as the pods do."""
    python: str = "python3"
    """The interpreter in the image."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29400
    """Where the pods meet, on the first one."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long the pods wait for each other before the ranks are started: images are pulled meanwhile."""

    def problems(self) -> list[str]:
        found = self._of_one_value() + self._of_maps()
        if self.gpus_per_node and self.procs != "auto" and self.procs > self.gpus_per_node:
            found.append(f"launcher.procs={self.procs}: each needs a GPU, and launcher.gpus_per_node="
                         f"{self.gpus_per_node}; set launcher.procs=auto")  # fmt: skip
        return found

    def _of_one_value(self) -> list[str]:
        forms = [
            (("namespace",), _LABEL, "a name of small letters, digits and -"),
            (("claim", "service_account"), _DOMAIN, "a name of small letters, digits, - and ."),
            (("cpu", "memory", "shm"), _QUANTITY, "a quantity, as 64, 500m or 500Gi"),
            (("image",), _IMAGE, "an image, as registry/name:tag or name@sha256:..."),
            (("gpu",), _DEVICE, "a resource, as nvidia.com/gpu"),
        ]
        found = [f"launcher.{key}: not given; {how}" for key, how in _ASKED.items() if getattr(self, key) == "???"]
        found += [f"launcher.{key}={value!r}: not {what}" for keys, form, what in forms for key in keys
                  if (value := getattr(self, key)) not in (None, "???") and not form.fullmatch(value)]  # fmt: skip
        if not re.fullmatch(r"(/[A-Za-z0-9_.-]+)+", self.mount) or self.mount == "/dev/shm":
            found.append(f"launcher.mount={self.mount!r}: not a folder as /work")
        found += [f"launcher.pull_with: {one!r}: not the name of a secret"
                  for one in self.pull_with if not _DOMAIN.fullmatch(one)]  # fmt: skip
        found += [f"launcher.env_from: {one!r}: not a reference; write NAME=SECRET/KEY, as HF_TOKEN=hub/token"
                  for one in self.env_from if not _FROM.fullmatch(one)]  # fmt: skip
        return found

    def _of_maps(self) -> list[str]:
        found = [f"launcher.{key}: {name!r}: not a key, as example.com/name"
                 for key in ("labels", "annotations", "node_selector") for name in getattr(self, key)
                 if not _KEY.fullmatch(name)]  # fmt: skip
        found += [f"launcher.{key}.{name}={value!r}: not the value of a label; letters, digits and _ . - may stand in "
                  f"one" for key in ("labels", "node_selector") for name, value in getattr(self, key).items()
                  if not _VALUE.fullmatch(value)]  # fmt: skip
        return [*found, *self._of_resources(), *self._of_tolerations(), *self._of_variables()]

    def _of_resources(self) -> list[str]:
        found, keys = [], {"cpu": "cpu", "memory": "memory", self.gpu: "gpus_per_node"}
        for name, value in self.resources.items():
            if name in keys:
                found.append(f"launcher.resources: {name}: is said by launcher.{keys[name]}")
            elif not _DEVICE.fullmatch(name) and not _OWN.fullmatch(name):
                found.append(f"launcher.resources: {name!r}: not a resource, as rdma/ib or ephemeral-storage")
            elif not _QUANTITY.fullmatch(value):
                found.append(f"launcher.resources.{name}={value!r}: not a quantity, as 1 or 500Gi")
            elif not _OWN.fullmatch(name) and not value.isdecimal():
                found.append(f"launcher.resources.{name}={value!r}: not a whole number, which this resource comes in")
        return found

    def _of_tolerations(self) -> list[str]:
        """The controllers would not refuse one of these, but make no pod for it, and say so only in an event."""
        found = []
        for one in self.tolerations:
            if unknown := [key for key in one if key not in _TOLERATION]:
                found.append(f"launcher.tolerations: {unknown[0]!r}: unknown key; there are "
                             f"{', '.join(sorted(_TOLERATION))}")  # fmt: skip
            found += [f"launcher.tolerations: {key}: {value}: not a {form.__name__}" for key, value in one.items()
                      if type(value) is not (form := int if key == "tolerationSeconds" else str)]  # fmt: skip
            found += [f"launcher.tolerations: {key}: {one[key]}: there are {', '.join(there)}"
                      for key, there in (("operator", _OPERATORS), ("effect", _EFFECTS))
                      if (one.get(key) or there[0]) not in there]  # fmt: skip
            exists = one.get("operator") == "Exists"
            if exists and one.get("value"):
                found.append(f"launcher.tolerations: value: {one['value']}: operator Exists has none")
            if not exists and not one.get("key"):
                found.append("launcher.tolerations: key: not given, which needs operator Exists")
            if "tolerationSeconds" in one and one.get("effect") != "NoExecute":
                found.append("launcher.tolerations: tolerationSeconds: needs effect NoExecute")
        return found

    def _of_variables(self) -> list[str]:
        found = []
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                found.append(f"launcher.env: {name!r}: not the name of a variable")
            elif is_secret(name):
                found.append(f"launcher.env.{name}: would be written into the manifest; put it into a secret of the "
                             f"cluster, and name that: 'launcher.env_from=[{name}=SECRET/KEY]'")  # fmt: skip
        names = [*self.env, *(one.partition("=")[0] for one in self.env_from)]
        found += [f"launcher.env: {name}: given more than once" for name in sorted(set(names)) if names.count(name) > 1]
        found += [f"launcher.env: {name}: is what dtrain or the controller tells a pod by; leave it out"
                  for name in (LEAD, INDEX[self.kind]) if name in names]  # fmt: skip
        return found

    def machine(self, here: Machine) -> Machine:
        return here if in_pod(os.environ) else machine_there(here, self.gpus_per_node)

    def topology(self, device: Device, machine: Machine) -> Topology:
        procs = procs_there(self.procs, self.gpus_per_node, device)
        if in_pod(os.environ):
            procs = procs_here(procs, device, machine)
        return Topology(nodes=self.nodes, procs_per_node=procs)

    def gathering(self) -> Gathering:
        return Gathering(leads=os.environ.get(INDEX[self.kind]) == "0", host=os.environ.get(LEAD),
                         timeout_s=self.join_timeout_s, port=self.port)  # fmt: skip

    def command(self, run_dir: Path, worker: Sequence[str], topology: Topology,
                meeting: Meeting | None = None) -> Command:  # fmt: skip
        return ranks(worker, topology, self.threads, meeting)

    def restarts(self) -> Restarts:
        return Restarts(self.max_restarts, self.restart_wait_s, code=AGAIN[self.kind] if in_pod(os.environ) else None)

    def job(self, run_dir: Path, launch: Sequence[str]) -> Job | None:
        if in_pod(os.environ):
            return None
        from dtrain.launchers._k8s import manifest, name_of, to_yaml

        name = name_of(run_dir.name)
        made = manifest(self, name, [self.python, "-u", "-m", "dtrain", *launch])
        where = [] if self.namespace is None else [f"--namespace={self.namespace}"]
        return Job(
            to_yaml(made), ["kubectl", "create", *where, "--output=name", "-f"],
            lambda resource: _follow(resource, name, where, self.kind),
            prepare=self.prepare == "submit", now=False, file="job.yaml", elsewhere=True,
        )  # fmt: skip


def in_pod(env: Mapping[str, str]) -> bool:
    return LEAD in env


def _follow(resource: str, name: str, where: Sequence[str], kind: str) -> dict[str, list[str]]:
    of = "jobset.sigs.k8s.io/jobset-name" if kind == "jobset" else "training.kubeflow.org/job-name"
    pods: list[str] = [*where, f"--selector={of}={name}"]
    return {
        "state": ["kubectl", "get", *where, resource],
        "pods": ["kubectl", "get", "pods", *pods],
        "log": ["kubectl", "logs", *pods, "--follow", "--prefix", "--max-log-requests=100"],
        "save, end": ["kubectl", "delete", *where, resource],
    }


def plain(value: Any) -> Any:
    """Without what is not said."""
    if isinstance(value, Mapping):
        said = {key: plain(one) for key, one in value.items()}
        return {key: one for key, one in said.items() if one is not None and one != {} and one != []}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
