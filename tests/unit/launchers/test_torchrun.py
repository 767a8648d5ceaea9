from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config.spec import Meeting
from dtrain.launchers._network import HOST, interface_of, is_here, towards
from dtrain.launchers.torchrun import Torchrun
from dtrain.plan.machine import Machine
from dtrain.plan.world import Topology

MEETING = Meeting("10.0.0.1", 2345, "abc", is_host=False, local="10.0.0.2", interface="eth7")
GPUS = Machine(cores=8, memory_bytes=2**33, gpus=4, gpu_name="H100", gpu_memory_bytes=0)
NASTY = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1) | st.sampled_from(
    ["a b", "'", '"', "; touch x", "$(touch x)", "`x`", "a\nb", "--nnodes=9", "é", "\\", "* ?", "#"]
)


def test_nodes_times_what_each_has() -> None:
    assert Torchrun(nodes=3).topology("cuda", GPUS) == Topology(nodes=3, procs_per_node=4)
    assert Torchrun(nodes=3, procs=1).topology("cpu", GPUS).size == 3


def test_torchrun_is_told_what_it_would_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    command = Torchrun(nodes=2).command(Path("/r"), ["worker"], Topology(2, 4), MEETING)
    assert list(command.argv) == [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:2345", "--rdzv-id=abc", "--rdzv-conf=is_host=0", "--local-addr=10.0.0.2",
        "--nproc-per-node=4", "--max-restarts=0", "--monitor-interval=0.1", "-m", "dtrain", "worker",
    ]  # fmt: skip
    assert command.env["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert "GLOO_SOCKET_IFNAME" not in Torchrun().command(Path("/r"), ["worker"], Topology(2, 1), MEETING).env


def test_an_address_of_ipv6_is_not_taken_for_a_port() -> None:
    meeting = Meeting("fd00::1", 2345, "abc", is_host=True, local="fd00::1", interface=None)
    assert "--rdzv-endpoint=[fd00::1]:2345" in Torchrun().command(Path("/r"), [], Topology(2, 1), meeting).argv


@settings(max_examples=50, deadline=None)
@given(words=st.lists(NASTY, min_size=1))
def test_what_is_typed_arrives_as_it_is(words: list[str]) -> None:
    for nodes, meeting in ((1, None), (2, MEETING)):
        argv = list(Torchrun(nodes=nodes).command(Path("/r"), words, Topology(nodes, 2), meeting).argv)
        assert argv[-len(words) - 2 :] == ["-m", "dtrain", *words]


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a;b", "a b", "$(x)", "a\nb", "", "a'b", "-", "a/b"])
def test_what_is_no_host_is_refused(host: str) -> None:
    assert Torchrun(host=host).problems()


@pytest.mark.parametrize("host", ["auto", "node-1", "node1.cluster.local", "10.0.0.1", "fd00::1", "n_1"])
def test_hosts(host: str) -> None:
    assert Torchrun(host=host).problems() == []
    assert host == "auto" or HOST.fullmatch(host)


def test_who_leads() -> None:
    assert Torchrun().gathering().leads is None
    assert Torchrun(host=socket.gethostname()).gathering().leads is True
    assert Torchrun(host="127.0.0.1", port=4000).gathering().port == 4000
    assert Torchrun(host="192.0.2.77").gathering().leads is False


def test_from_some_to_some() -> None:
    some = Torchrun(nodes="2:4", last_call_s=7)
    assert some.topology("cuda", GPUS) == Topology(nodes=4, procs_per_node=4)
    assert (some.gathering().least, some.gathering().last_call_s) == (2, 7)
    assert not some.restarts().counts_lost
    assert Torchrun(nodes="3:3").gathering().least is Torchrun(nodes=3).gathering().least is None
    assert Torchrun(nodes="4:2").problems() == ["launcher.nodes=4:2: at least 4 and at most 2; type 2:4"]


def test_this_machine_on_the_network() -> None:
    assert is_here("localhost")
    assert not is_here("no-such-host.invalid")
    assert towards("127.0.0.1") == "127.0.0.1"
    assert towards("no-such-host.invalid") is None
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
