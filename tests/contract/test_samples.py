"""What is written in the middle of a training changes nothing of it, and is what the model of that step writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.small import VOCAB, Recipe, Record, make, make_built, overrides
from tests.contract.test_equivalence import STRATEGIES
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10 w11"]
NEW = 6


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that the state of the random generators matters, and a tokenizer of as many words as there are
    tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("wordy")
    make(folder, dropout=0.2)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "w0", "pad_token": "w0"}')
    return folder


class Samples(Record):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def samples(self, report: Any) -> None:
        self.written.append(report)


@dataclasses.dataclass
class Ran:
    numbers: list[float]
    weights: dict[str, np.ndarray]
    written: list[tuple[int, list[str]]]


def _run(folder: Path, typed: list[str]) -> Ran:
    from dtrain.engine.state import Progress

    built, record = make_built(folder, typed), Samples()
    built.engine.run([record], Progress())
    numbers = [value for one in record.reports for value in (one.loss, one.grad_norm)]
    numbers += [one.loss for one in record.evals]
    weights = {name: full.numpy() for name, full in built.strategy.full_state()}
    return Ran(numbers, weights, [(one.step, [each.text for each in one.samples]) for one in record.written])


def _both(folder: Path, typed: list[str], prompts: str) -> tuple[Ran, Ran]:
    return _run(folder, typed), _run(folder, [*typed, prompts])


def _typed(folder: Path, strategy: str) -> list[str]:
    more = DIVIDED if strategy == "zero3" else ()
    return overrides(folder, Recipe(8, steps=4), f"strategy={strategy}", "eval.every_steps=2",
                     f"eval.max_new_tokens={NEW}", *more)  # fmt: skip


def _asked(num: int) -> str:
    return f"eval.prompts={json.dumps(PROMPTS[:num])}"


def _greedy(weights: dict[str, np.ndarray], folder: Path) -> list[str]:
    """By transformers alone, a whole forward for each token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    found = []
    for prompt in PROMPTS:
        ids = [int(word[1:]) for word in prompt.split()]
        first = len(ids)
        while len(ids) < first + NEW and ids[-1] != 0:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(" ".join(f"w{i}" for i in ids[first:] if i != 0))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_with_samples_equals_one_without(wordy: Path, strategy: str) -> None:
    # Three prompts on two ranks: one has two of them, the other one, and ends with other texts than the first.
    for plain, sampled in run_ranks(_both, wordy, _typed(wordy, strategy), _asked(3), size=2):
        assert plain.written == []
        assert sampled.numbers == plain.numbers
        for name, weight in plain.weights.items():
            np.testing.assert_array_equal(sampled.weights[name], weight, err_msg=name)
        assert [step for step, _ in sampled.written] == [2, 4]
        assert sampled.written[-1][1] == _greedy(sampled.weights, wordy)[:3]


def test_a_rank_without_a_prompt_runs_along(wordy: Path) -> None:
    # Four prompts on three ranks: two have two each.
    typed = [*_typed(wordy, "fsdp2"), _asked(4), "eval.every_steps=0"]
    for ran in run_ranks(_run, wordy, typed, size=3):
        assert ran.written == [(4, _greedy(ran.weights, wordy))]


def _stopped(folder: Path, typed: list[str]) -> tuple[str | None, int, int | None]:
    """Rank 1 is told to stop after the second token."""
    from dtrain.engine.control import Control
    from dtrain.engine.state import Progress

    built, record, control = make_built(folder, typed), Samples(), Control()
    engine, asked = built.engine, []
    go_on = engine._go_on

    def told(left: int) -> bool:
        asked.append(left)
        if len(asked) == 3 and built.comm.rank == 1:
            control.on_signal(15, None)
        return go_on(left)

    engine._go_on = told
    result = engine.run([record], Progress(), control=control)
    assert record.written == []
    return result.stopped, len(asked), result.state.sample_step


def test_a_stop_is_heard_between_two_tokens(wordy: Path) -> None:
    typed = [*_typed(wordy, "ddp"), _asked(2), "eval.every_steps=0", "eval.max_new_tokens=20"]
    for stopped, asked, step in run_ranks(_stopped, wordy, typed, size=2):
        assert stopped is not None
        assert (asked, step) == (3, None)


def test_what_writes_no_text_is_refused(wordy: Path, tmp_path: Path) -> None:
    from dtrain.errors import ModelError

    shutil.copytree(wordy, tmp_path / "a")
    config = tmp_path / "a" / "model" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    (failed,) = run_ranks(_refused, tmp_path / "a", [*_typed(tmp_path / "a", "ddp"), _asked(1)], size=1)
    assert failed == (ModelError.__name__, "eval.prompts: CausalLM writes no text; leave them out")


def _refused(folder: Path, typed: list[str]) -> tuple[str, str]:
    from dtrain.errors import ModelError

    try:
        make_built(folder, typed)
    except ModelError as error:
        return type(error).__name__, str(error)
    raise AssertionError("it was built")
