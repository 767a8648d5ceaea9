"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dtrain

ROOT = Path(dtrain.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree and unpacked, as an installer does it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_it_has_all_that_a_run_reads(wheel: Path) -> None:
    share = wheel / "dtrain" / "_share"
    for name in ("conf", "launch"):
        there = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
        assert there == {path.relative_to(share) for path in (share / name).rglob("*") if path.is_file()}
    assert (wheel / "dtrain" / "py.typed").is_file()
    (info,) = wheel.glob("dtrain-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    said = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    assert (said["Version"], said["License-Expression"]) == (dtrain.__version__, "Apache-2.0")


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(wheel)}

    def typed(*argv: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dtrain", *argv], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert typed("--version") == f"dtrain {dtrain.__version__}\n"
    assert "strategy   ddp" in typed("plan", "device=cpu", "launcher.procs=2", "experiment=smoke", "strategy=ddp")
    job = typed("launch", "--dry-run", "launcher=slurm", "launcher.nodes=2", "experiment=smoke")
    assert "#!/bin/bash" in job
    code = "import dtrain.config.compose as c; print(c.shared_dir())"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()) == wheel / "dtrain" / "_share"
