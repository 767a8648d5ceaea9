"""Modules whose parameters have shapes and no values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def params_on_meta() -> Iterator[None]:
    """Parameters that are made inside lose their values at once; buffers, which nothing would restore, keep theirs."""

    def on_meta(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        return None if param.is_meta else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    # Typed as giving None, documented as giving the parameter to use instead.
    handle = nn.modules.module.register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
