from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.timeout(900)
def test_every_strategy_trains_and_agrees_on_this_gpu() -> None:
    script = Path(__file__).parents[2] / "bench" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script), "--quick", "--steps", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
