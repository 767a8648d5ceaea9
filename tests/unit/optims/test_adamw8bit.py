"""Moments in 8 bits, as strategies see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtrain.optims.adamw import AdamW
from dtrain.optims.adamw8bit import AdamW8bit
from dtrain.optims.packed import AbstractPacked

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPE = (21, 300)
"""More than the 4,096 numbers from which on the library uses 8 bits, and no whole number of blocks."""


def _trained(spec: Any, steps: int, look: bool = False) -> tuple[torch.nn.Parameter, torch.nn.Parameter, Any]:
    draw = torch.Generator().manual_seed(0)
    large = torch.nn.Parameter(torch.randn(SHAPE, generator=draw))
    small = torch.nn.Parameter(torch.randn(7, generator=draw))
    optimizer = spec.build([("large", large), ("small", small)])
    for _ in range(steps):
        for param in (large, small):
            param.grad = torch.randn(param.shape, generator=draw) * (0.2 + torch.rand(param.shape, generator=draw))
        optimizer.step()
        if look:
            for param in (large, small):
                with optimizer.opened(param) as state:
                    assert state["exp_avg"].shape == param.shape
    return large, small, optimizer


def test_the_update_is_adamws_to_8_bits() -> None:
    large, small, optimizer = _trained(AdamW8bit(lr=1e-2), 5)
    expected, exactly, plain = _trained(AdamW(lr=1e-2), 5)
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    apart = (large - expected).detach().abs()
    assert 0 < float(apart.mean()) < 0.02 * 5e-2  # five steps of at most the rate
    assert torch.allclose(small, exactly, rtol=1e-5, atol=1e-6)
    with optimizer.opened(large) as state:
        for name, value in state.items():
            moment = plain.state[expected][name]
            assert float((value - moment).abs().max()) < 0.03 * float(moment.abs().max()), name


def test_looking_at_the_moments_does_not_change_them() -> None:
    one, two = _trained(AdamW8bit(lr=1e-2), 4), _trained(AdamW8bit(lr=1e-2), 4, look=True)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2].state[one[0]]["state1"], two[2].state[two[0]]["state1"])


def test_what_was_read_is_packed_into_the_same_bits() -> None:
    large, small, optimizer = _trained(AdamW8bit(lr=1e-2), 4)
    fresh = AdamW8bit(lr=1e-2).build([("large", large), ("small", small)])
    assert isinstance(fresh, AbstractPacked)
    for param in (large, small):
        fresh.make(param, ("exp_avg", "exp_avg_sq"), 4)
        with optimizer.opened(param) as said, fresh.opened(param) as into:
            for name, value in said.items():
                into[name].copy_(value)
    for key in ("1", "2"):
        kept, again = optimizer.state[large], fresh.state[large]
        assert torch.equal(kept[f"state{key}"], again[f"state{key}"])
        torch.testing.assert_close(kept[f"absmax{key}"], again[f"absmax{key}"], rtol=2e-7, atol=0)
        assert torch.equal(optimizer.state[small][f"state{key}"], fresh.state[small][f"state{key}"])
    assert fresh.state[large]["step"] == 4
