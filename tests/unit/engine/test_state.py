"""Where a run was, out of a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dtrain.engine.state import State
from dtrain.errors import CheckpointError

WHERE = State(step=3, samples=24, tokens=96, targets=90, first_loss=2.5, last_loss=1.5, recent=(2.5, 1.5), left_out=(2,),
              eval_step=2, eval_loss=2.0, consumed={"": {"samples": 24, "tokens": 96}}, stream={"at": [1, 2]})  # fmt: skip


def test_there_and_back() -> None:
    assert State.from_dict(json.loads(json.dumps(WHERE.as_dict()))) == WHERE
    assert State.from_dict({"step": 3, "samples": 24, "of a later version": 1}) == State(step=3, samples=24)


@pytest.mark.parametrize(("changed", "said"), [
    ({"samples": None}, "its progress.samples: "), ({"samples": -1}, "its progress.samples: "),
    ({"step": "x"}, "its progress.step: "), ({"recent": 3}, "its progress.recent: "),
    ({"recent": ["x"]}, "its progress.recent.0: "), ({"consumed": {"a": 3}}, "its progress.consumed.a: "),
    ({"stream": []}, "its progress.stream: "), ({"eval_loss": {}}, "its progress.eval_loss: "),
])  # fmt: skip
def test_what_makes_no_sense_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        State.from_dict({**WHERE.as_dict(), **changed})


def test_without_its_place_in_the_data_it_does_not_begin_with_the_first_row() -> None:
    with pytest.raises(CheckpointError, match="lacks samples and step"):
        State.from_dict({"tokens": 96})
