"""Data that is read while training gives the model that one plain process makes of the same rows, and goes on anywhere."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from dtrain.checkpoint.manifest import folder_name
from tests.contract.saved import rows_of, run, whole
from tests.contract.small import Recipe, Trained, make, overrides, reference, settled, stream_in
from tests.contract.test_equivalence import difference
from tests.contract.test_resume import WAYS, assert_same
from tests.processes import run_ranks

# 256 texts in 4 shards are some 110 rows a pass: the run ends in its second one.
RECIPE = Recipe(14, steps=12)
HALF = 6


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    make(folder, vocab=300)
    with (folder / "texts.jsonl").open("w") as file:
        for i in range(256):
            file.write(json.dumps({"text": f"{i} " + "the cat sat " * (i * 5 % 4)}) + "\n")
    return folder


@functools.cache
def _plain(streamed: Path, leave_out: tuple[int, ...]) -> Trained:
    rows = list(stream_in(streamed).samples(RECIPE.global_batch * RECIPE.steps))
    return reference(streamed, RECIPE, rows=rows, leave_out=leave_out)


# 3 ranks share 4 shards unevenly; 5 are more than there are. The step before a save is left out, and steps on both
# sides of it, the last one among them.
@pytest.mark.parametrize(("before", "after", "leave_out"), [
    (("ddp", 1), ("zero2", 2), ()), (("zero3", 2), ("fsdp2", 3), (2, HALF, 9)), (("fsdp2", 3), ("ddp", 1), ()),
    (("ddp", 2), ("ddp", 5), (HALF + 1, RECIPE.steps)),
])  # fmt: skip
def test_it_equals_one_plain_process_and_goes_on_on_other_ranks(
    streamed: Path, tmp_path: Path, before: tuple[str, int], after: tuple[str, int], leave_out: tuple[int, ...]
) -> None:
    plain, ran = _plain(streamed, leave_out), []
    for (strategy, size), start in ((before, None), (after, tmp_path / folder_name(HALF))):
        typed = overrides(streamed, RECIPE, f"checkpoint.every_steps={HALF}", "checkpoint.at_end=false",
                          f"strategy={strategy}", f"train.leave_out=[{','.join(map(str, leave_out))}]")  # fmt: skip
        ran.append(run_ranks(functools.partial(run, noise=False), streamed, settled(typed), tmp_path, start, size=size))
    first, rest = ran
    steps = [step for step in range(1, RECIPE.steps + 1) if step not in leave_out]
    half = sum(step <= HALF for step in steps)
    ids = [plain.ids[step - 1] for step in steps]
    assert [sorted(given) for given in rows_of(first)] == ids
    assert [sorted(given) for given in rows_of(rest)] == ids[half:]
    assert first[0].losses == pytest.approx(plain.losses, rel=1e-5)
    assert rest[0].losses == pytest.approx(plain.losses[half:], rel=1e-5)
    assert rest[0].norms == pytest.approx(plain.norms[half:], rel=1e-5)
    for ranks in ran:
        last = whole(one.last for one in ranks)
        for name, weight in plain.weights.items():
            assert difference(last["weight"][name], weight) < 1e-5, name


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3-cpu"])
def test_the_same_again_is_the_same_to_the_last_bit(streamed: Path, tmp_path: Path, way: str) -> None:
    """Where adapters drop out, an objective draws numbers of its own, and evals come between."""
    typed = overrides(streamed, Recipe(14, steps=6), *WAYS[way], "tuning=lora", "tuning.rank=3", "tuning.dropout=0.3",
                      "eval.every_steps=1", "checkpoint.every_steps=3", "checkpoint.at_end=false")  # fmt: skip
    go = functools.partial(run_ranks, functools.partial(run, noise=True), streamed, settled(typed), size=2)
    through = go(tmp_path / "a", None)
    again = go(tmp_path / "b", tmp_path / "a" / folder_name(3))
    for one, other in zip(through, again, strict=True):
        assert (one.losses[3:], one.norms[3:], one.ids[3:]) == (other.losses, other.norms, other.ids)
    assert_same(whole(ran.last for ran in again), whole(ran.last for ran in through))
