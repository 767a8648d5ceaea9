"""The state of this process's random generators, as bytes; no pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch


def seed(value: int) -> None:
    """Begin anew, all of them: what a plugin draws is the same in every run too."""
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def save(device: torch.device) -> dict[str, bytes]:
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy = [str(kind), np.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss)]
    said = {
        "rng.torch": torch.get_rng_state().numpy().tobytes(),
        "rng.numpy": json.dumps(numpy).encode(),
        "rng.python": json.dumps(random.getstate()).encode(),
    }
    if device.type == "cuda":
        said["rng.cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return said


def load(said: Mapping[str, bytes], device: torch.device) -> None:
    """Go on where the process that `save`d left off; what is not said stays as it is."""
    if "rng.torch" in said:
        torch.set_rng_state(_bytes(said["rng.torch"]))
    if "rng.numpy" in said:
        kind, keys, *rest = json.loads(said["rng.numpy"])
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    if "rng.python" in said:
        version, internal, gauss = json.loads(said["rng.python"])
        random.setstate((version, tuple(internal), gauss))
    if "rng.cuda" in said and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(said["rng.cuda"]), device)


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
