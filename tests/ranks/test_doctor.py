"""The doctor on two machines, played by two commands with one folder: they meet, and their ranks sum up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.command import ROOT


def test_two_machines_meet_and_measure(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "dtrain",
        "doctor",
        "--dir",
        str(tmp_path),
        "--only",
        "ranks",
        "--nodes",
        "2",
        "--procs",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    machines = [
        subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)
    ]
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    for text in said:
        nodes, clocks, ranks = text.splitlines()
        assert nodes.startswith("ok    nodes ")
        assert clocks.startswith("ok    clocks ")
        assert ranks.split()[1] == "ranks"
        assert "2 processes sum up " in ranks
    assert list(tmp_path.iterdir()) == []
