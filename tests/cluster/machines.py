"""Launchers of one machine that share a folder, as several machines would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.command import ROOT, write_texts

RECORD = """import os, sys
if "worker" in sys.orig_argv and "RANK" in os.environ:
    from pathlib import Path
    from tests.faults.harness import record_rows
    from dtrain.runs import RunDir
    record_rows(RunDir(os.environ["DTRAIN_RUN"]).attempt_dir(int(os.environ["DTRAIN_ATTEMPT"]))
                / f"rank-{os.environ['RANK']}.rows.jsonl")
"""


class Machines:
    """Launchers in `folder`, as if each were on a machine of its own; each says to `out-N` what it says, and every rank
    writes down the rows that it takes.
    """

    def __init__(self, folder: Path, num_texts: int = 300) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[str]]()
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(RECORD)
        write_texts(folder / "texts.jsonl", num_texts)

    def start(self, *typed: str, inside: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
        with (self.folder / f"out-{len(self.started)}").open("w") as out:
            one = subprocess.Popen(
                [*inside, sys.executable, "-m", "dtrain", "launch", *typed], cwd=self.folder, text=True, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{self.folder / 'site'}:{ROOT}", "OMP_NUM_THREADS": "1", **env},
            )  # fmt: skip
        self.started.append(one)
        return one

    def said(self, number: int) -> str:
        return (self.folder / f"out-{number}").read_text()
