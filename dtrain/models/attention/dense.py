"""transformers' attention with a mask of all pairs of tokens of a row, made from the positions."""

from __future__ import annotations

from collections.abc import Callable

from dtrain.models.attention.base import Asked, Backend


def _lacks(implementation: str) -> Callable[[Asked], str | None]:
    def lacks(asked: Asked) -> str | None:
        if asked.built_for not in (None, implementation):
            return f"the model's layers were made for {asked.built_for} alone"
        if implementation == "sdpa" and asked.softcap is not None:
            return "caps no scores"
        return None

    return lacks


SDPA = Backend(name="sdpa", implementation="sdpa", lacks=_lacks("sdpa"), flat=False)
EAGER = Backend(name="eager", implementation="eager", lacks=_lacks("eager"), flat=False)
