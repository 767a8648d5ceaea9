"""Leak guards for every test: environment, process group, child processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator

os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed; ranks are forked with it
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("PYTHONOPTIMIZE", None)
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor"
)  # else torch sets it on import

import pytest
from hypothesis import HealthCheck, settings

from tests import measured

settings.register_profile("dtrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dtrain")
"""The same examples each time, however busy the machine; `pytest --hypothesis-profile default` looks for others."""


@pytest.fixture(autouse=True)
def _measured(record_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    for name, value in measured.taken().items():
        record_property(name, value)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    leaked = {
        key
        for key in after.keys() | before.keys()
        if not key.startswith("PYTEST_") and after.get(key) != before.get(key)
    }
    for key in leaked:
        os.environ.pop(key, None)
        if key in before:
            os.environ[key] = before[key]
    assert not leaked, f"the test changed the environment: {sorted(leaked)}"
    import sys

    if "torch.distributed" in sys.modules:
        assert not sys.modules["torch.distributed"].is_initialized(), "the test left a process group"
