from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config.spec import Call
from dtrain.errors import ConfigError, PlanError
from dtrain.launchers import _hosts, _orders
from dtrain.launchers._orders import HOSTS, Orders
from dtrain.launchers.deepspeed import DeepSpeed
from dtrain.plan.machine import Machine
from dtrain.plan.world import Topology
from tests.unit.launchers.test_torchrun import NASTY

HERE = Machine(cores=4, memory_bytes=2**33, gpus=0, gpu_name="", gpu_memory_bytes=0)
NODE = dataclasses.replace(HERE, gpus=8, gpu_name="H100", gpu_memory_bytes=2**36)
POOL = {"w-0": 4, "w-1": 4, "10.0.0.3": 4}
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
HOSTILE = NASTY | st.sampled_from(
    ["-oProxyCommand=touch x", "w-0;touch", "%h", "%%", "$(touch${IFS}x)", "a,b", "^x", "~"]
)


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DTRAIN_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# ours\nw-0 slots=4\n\nw-1   slots=4  # the new one\n10.0.0.3 slots=4\n")
    return str(path)


def calls(hostfile: str, words: Sequence[str] = ("launch",), **values: Any) -> Sequence[Call]:
    return DeepSpeed(hostfile=hostfile, **values).calls(words, Path("/run/.nodes/head-1"))


def test_a_hostfile(hostfile: str) -> None:
    assert _hosts.read(Path(hostfile)) == POOL


def test_a_hostfile_of_another_editor(tmp_path: Path) -> None:
    """With the mark that some write before UTF-8, and lines that end as on Windows."""
    path = tmp_path / "hosts"
    for first in (b"", b"# ours\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + first + b"w-0 slots=4\r\nw-1 slots=4 # new\r\n")
        assert _hosts.read(path) == {"w-0": 4, "w-1": 4}
    path.write_bytes("w-0 slots=4\r\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"launcher.hostfile=.*hosts': not text in UTF-8 .*; save it as that"):
        _hosts.read(path)


@pytest.mark.parametrize("chosen", [
    ("", ""), ("w-1", ""), ("w-1@w-0:0,2", ""), ("w-0:1@w-0:3", ""), ("", "w-1:0"), ("", "w-0@10.0.0.3:3,1"),
    ("", "w-0:0,1,2,3"), ("w-0:2,2,0", ""),
])  # fmt: skip
def test_what_is_chosen_is_what_deepspeed_chooses(chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which it sets
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    theirs = parse_inclusion_exclusion(POOL, *chosen)
    ours = {host.name: host.slots for host in _hosts.choose(POOL, *chosen)}
    assert list(ours) == list(theirs)
    assert {name: set(slots) for name, slots in ours.items()} == {name: set(slots) for name, slots in theirs.items()}


@pytest.mark.parametrize(("include", "exclude", "says"), [
    ("w-0", "w-1", "one or the other"), ("w-9", "", "'w-9' is not in the hostfile; there are: w-0, w-1, 10.0.0.3"),
    ("w-0:4", "", "w-0 has slots 0 to 3, and no 4"), ("w-0:a", "", "not as NAME:0,1"), ("w-0:", "", "not as NAME:0,1"),
    ("", "w-0@w-1@10.0.0.3", "no machine is left"), ("w-0@", "", "'' is not in the hostfile"),
])  # fmt: skip
def test_what_cannot_be_chosen(include: str, exclude: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _hosts.choose(POOL, include, exclude)


@pytest.mark.parametrize(("text", "says"), [
    ("w-0 slots=4\nw-0 slots=4\n", "line 2: .*named twice"), ("w-0\n", "not as `worker-1 slots=8`"), ("", "names no machine"),
    ("w-0 slots=0", "no slots"), ("w-0 slots=4 max=3", "not as"), ("me@w-0 slots=1", r"launcher.ssh_options=\{User:NAME\}"),
    ("-oProxyCommand=x slots=1\na;b slots=1", r"(?s)line 1.*line 2"), ("w-0 slots=2; touch x", "not as"),
])  # fmt: skip
def test_what_is_no_hostfile(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=says):
        _hosts.read(tmp_path / "hosts")


def test_no_hostfile_is_never_this_machine_alone(tmp_path: Path) -> None:
    for name, says in (
        ("???", "say where the list"),
        (str(tmp_path / "no"), "No such file"),
        (str(tmp_path), "directory"),
    ):
        with pytest.raises(ConfigError, match=says):
            DeepSpeed(hostfile=name).topology("cpu", HERE)


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.tuples(HOSTILE, HOSTILE | st.just("slots=1")), min_size=1, max_size=4))
def test_only_names_of_machines_come_out_of_a_hostfile(
    lines: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile-hosts"
    path.write_text("\n".join(f"{name} {rest}" for name, rest in lines), encoding="utf-8", newline="")
    try:
        found = calls(str(path))
    except ConfigError as error:
        assert str(path) in str(error)
        return
    for call in found:
        assert call.command.argv[-2] == call.hosts[0]
        assert all(shlex.quote(host) == host and not host.startswith("-") for host in call.hosts)


STUB = '#!/bin/sh\nprintf "%s\\0" "$PYTHONPATH" "$@" >"$OUT/words"\ncat >"$OUT/told"\n'


def on_the_machine(call: Call, folder: Path, shell: str) -> tuple[list[str], Orders]:
    """What reaches the interpreter of the first machine of the call, whose login shell reads the command."""
    text = call.command.argv[-1]
    if call.unread:  # pdsh
        assert "%" not in text.replace("%%", "").replace("%h", "")
        text = "%".join(part.replace("%h", call.hosts[0]) for part in text.split("%%"))
    done = subprocess.run([shell, "-c", text], cwd=folder, env={"PATH": os.environ["PATH"], "OUT": str(folder)},
                          input=b"" if call.unread else call.told, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    told = (folder / "told").read_text()
    return words, Orders.from_json(told) if words[-1] == "-" else Orders.from_word(words[-1])


@settings(max_examples=60, deadline=None)
@given(words=st.lists(HOSTILE, min_size=1, max_size=4), env=st.dictionaries(NAMES, HOSTILE, max_size=3), python=HOSTILE,
       path=HOSTILE, by=st.sampled_from(["ssh", "pdsh"]), shell=st.sampled_from(["sh", "bash"]))  # fmt: skip
def test_a_shell_there_reads_what_was_typed(
    words: list[str], env: dict[str, str], python: str, path: str, by: str, shell: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("there")
    (folder / "hosts").write_text("w-0 slots=1\nw-1 slots=1\n")
    interpreter = folder / f"a{python.replace('/', '_')[:40]}"
    interpreter.write_text(STUB)
    interpreter.chmod(0o755)
    before = {path.name for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**env, "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        try:
            call = calls(str(folder / "hosts"), words, by=by, python=str(interpreter), env=tuple(env))[0]
        except ConfigError as error:
            assert str(error).startswith(("launcher.python=", "PYTHONPATH="))
            said = str(interpreter) + path
            assert set(said) & set("\\!=") or not said.isprintable()
            return
        expected = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    got, orders = on_the_machine(call, folder, shell)
    assert got[:-1] == [expected, "-u", "-m", "dtrain", "node", "w-0"]
    assert list(orders.launch) == words
    assert {name: orders.env[name] for name in env} == env
    assert orders.cwd == str(Path.cwd())
    assert {path.name for path in folder.iterdir()} == {*before, "words", "told"}


@settings(max_examples=100, deadline=None)
@given(name=HOSTILE | NAMES, value=HOSTILE, by=st.sampled_from(["ssh", "pdsh"]))
def test_an_option_of_ssh_stays_one(name: str, value: str, by: str) -> None:
    launcher = DeepSpeed(hostfile="hosts", by=by, ssh_options={name: value})
    if launcher.problems():
        assert "launcher.ssh_options" in launcher.problems()[0]
        return
    words = _orders.ssh_words(None, launcher.ssh_options, 10)
    assert words[:2] == ["-o", f"{name}={value}"]
    assert name.lower() not in ("proxycommand", "localcommand", "include")
    if by == "pdsh":
        assert " ".join(words).split() == words


@pytest.mark.parametrize(("values", "says"), [
    ({"ssh_options": {"ProxyCommand": "x"}}, "ProxyCommand: it has ssh run a command"),
    ({"ssh_options": {"User": "a b"}, "by": "pdsh"}, "'a b' is to be of letters"), ({"env": ("A-B",)}, "launcher.env: 'A-B'"),
    ({"host": "-x"}, "launcher.host=-x"), ({"env": ("CUDA_VISIBLE_DEVICES",)}, "each machine has its own"),
    ({"by": "hand", "env": ("X",)}, "launcher.env: is for machines that are called, and launcher.by=hand calls none"),
    ({"by": "hand", "ssh_port": 22}, "launcher.ssh_port: is for machines that are called"),
])  # fmt: skip
def test_what_is_refused(values: dict[str, Any], says: str) -> None:
    assert says in "\n".join(DeepSpeed(hostfile="hosts", **values).problems())


def test_yes_and_no_of_yaml_are_those_of_ssh() -> None:
    assert "ForwardAgent=no" in _orders.ssh_words(22, {"ForwardAgent": False}, 10)
    assert _orders.ssh_words(22, {}, 10)[:2] == ["-o", "Port=22"]


def test_secrets_are_in_no_argv_and_are_not_lost_in_silence(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-mine")
    for call in calls(hostfile):
        assert Orders.from_json(call.told.decode()).env["HF_TOKEN"] == "s3cr3t-of-mine"
        assert "s3cr3t" not in str(call.command)
    values = {"WANDB_BASE_URL": "https://me:passw0rd@wandb.here", "HF_HEADER": "Bearer s3cr3t-of-mine"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    (call,) = calls(hostfile, by="pdsh", env=("HF_TOKEN",))
    orders = Orders.from_word(call.command.argv[-1].split()[-1])
    for name in ("HF_TOKEN", *values):
        assert name in call.left_out
        assert name not in orders.env
    assert Orders.from_json(calls(hostfile)[0].told.decode()).env["WANDB_BASE_URL"] == values["WANDB_BASE_URL"]


def test_a_variable_that_is_not_there_is_not_passed_over(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError) as caught:
        calls(hostfile, env=("NO_SUCH", "EMPTY", "NOR_THIS"))
    assert str(caught.value).splitlines() == [
        f"launcher.env: {name}: is not set here, so that there is nothing to pass on; set it before (export {name}=...), "
        f"or leave it out" for name in ("NO_SUCH", "NOR_THIS")]  # fmt: skip
    assert Orders.from_json(calls(hostfile, env=("EMPTY",))[0].told.decode()).env["EMPTY"] == ""


def test_what_is_too_long_is_told(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_LONG", "x" * 50_000)
    with pytest.raises(ConfigError, match="too long to be handed on; the largest: NCCL_LONG"):
        calls(hostfile)


def test_each_machine_gets_its_gpus(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.launchers.afar import environment

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # of this machine
    orders = Orders.from_json(calls(hostfile, include="w-0:1,3@w-1:0,1")[0].told.decode())
    assert orders.procs == 2
    assert "CUDA_VISIBLE_DEVICES" not in orders.env
    assert environment("w-0", orders)["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert json.loads(environment("w-1", orders)[HOSTS]) == {"nodes": 2, "index": 1, "procs": 2, "start": "head-1"}
    whole = Orders.from_json(calls(hostfile)[0].told.decode())
    assert "CUDA_VISIBLE_DEVICES" not in environment("w-0", whole)


def test_how_many(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = DeepSpeed(hostfile=hostfile)
    assert launcher.topology("cpu", HERE) == Topology(3, 4)
    assert launcher.machine(NODE).gpus == 4
    with pytest.raises(ConfigError, match="w-0 2, w-1 4"):
        DeepSpeed(hostfile=hostfile, include="w-0:0,1@w-1").topology("cpu", HERE)
    monkeypatch.setenv(HOSTS, json.dumps({"nodes": 2, "index": 1, "procs": 4, "start": "head-1"}))
    there = DeepSpeed(hostfile="not seen there")
    assert there.topology("cuda", NODE) == Topology(2, 4)
    assert there.calls(["launch"], Path("/run")) == ()
    assert (there.gathering().leads, there.gathering().start) == (False, "head-1")
    with pytest.raises(PlanError, match="has slots=4, a GPU for each, and 0 are visible"):
        there.topology("cuda", HERE)


def test_by_hand_it_is_typed_on_each(hostfile: str) -> None:
    launcher = DeepSpeed(hostfile=hostfile, by="hand", exclude="w-1")
    assert launcher.calls(["launch"], Path("/run")) == ()
    assert launcher.topology("cuda", NODE) == Topology(2, 4)
    assert launcher.gathering().leads is None
    with pytest.raises(PlanError, match="CUDA_VISIBLE_DEVICES"):
        DeepSpeed(hostfile=hostfile, by="hand", include="w-0:0,1@w-1:0,1").topology("cuda", NODE)


def test_what_is_typed(hostfile: str) -> None:
    first, *others = calls(hostfile, ssh_port=2222, connect_timeout_s=7)
    assert [call.hosts for call in others] == [["w-1"], ["10.0.0.3"]]
    argv = list(first.command.argv)
    assert argv[:4] == ["ssh", "-T", "-o", "Port=2222"]
    assert "ConnectTimeout=7" in argv
    assert argv[-3:-1] == ["--", "w-0"]
    assert argv[-1].endswith(f"{sys.executable} -u -m dtrain node w-0 -")
    (call,) = calls(hostfile, by="pdsh")
    assert list(call.command.argv[:-1]) == ["pdsh", "-R", "ssh", "-S", "-f", "3", "-t", "10", "-w",
                                             "w-0,w-1,10.0.0.3"]  # fmt: skip
    assert "ConnectTimeout=10" in call.command.env["PDSH_SSH_ARGS_APPEND"]


@pytest.mark.parametrize("word", ["", "e30=", "bm8=", "%%%", "é"])
def test_words_of_something_else_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="not what `dtrain launch` sends"):
        Orders.from_word(word)
