"""One checkpoint: what any strategy saves on any number of ranks, any other goes on from on any other number.

A node is a strategy on a number of ranks. A set of pairs of nodes that meets every node, every pair of strategies and
every pair of sizes runs always; `make matrix` runs all pairs.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dtrain.checkpoint.manifest import folder_name
from dtrain.config.schema import Config
from tests.contract.saved import Ran, Whole, rows_of, run, whole
from tests.contract.small import Recipe, Trained, make, overrides, reference, settled
from tests.contract.test_equivalence import STRATEGIES, difference
from tests.contract.test_variants import DIVIDED
from tests.processes import run_ranks

WAYS: dict[str, tuple[str, ...]] = {
    **{name: (f"strategy={name}",) for name in STRATEGIES},
    "hsdp": ("strategy=fsdp2", "strategy.replicas=2"),
    "zero2-cpu": ("strategy=zero2", "strategy.offload_optimizer=cpu"),
    "zero3-cpu": ("strategy=zero3", *DIVIDED, "strategy.offload_optimizer=cpu", "strategy.offload_param=cpu"),
    "zero3-divided": ("strategy=zero3", *DIVIDED, "strategy.sub_group_size=3000"),
}
SIZES = (1, 2, 3, 4)
# 26 rows: the sixth step ends within the second epoch, and batches lie across the ends of epochs. 7 samples are uneven
# on 2, 3 and 4 ranks.
RECIPE = Recipe(7, steps=12)
HALF = 6


class Node(NamedTuple):
    way: str
    size: int

    def __str__(self) -> str:
        return f"{self.way}@{self.size}"


Pair = tuple[Node, Node]
NODES = [Node(way, size) for way in WAYS for size in SIZES if way != "hsdp" or size % 2 == 0]


def _all_pairs() -> list[Pair]:
    return [(source, target) for source in NODES for target in NODES if source != target]


def _meets(pair: Pair) -> set[tuple[object, ...]]:
    """What a pair shows, of all that is to be shown."""
    source, target = pair
    return {("from", source), ("into", target), ("ways", source.way, target.way), ("sizes", source.size, target.size)}


def _covering() -> list[Pair]:
    """Few pairs that meet what all pairs meet: each in turn one that meets most, of the sizes that were seen least."""
    left = set().union(*map(_meets, _all_pairs()))
    found: list[Pair] = []
    seen = dict.fromkeys(itertools.product(SIZES, SIZES), 0)
    while left:
        best = max(_all_pairs(), key=lambda pair: (len(_meets(pair) & left), -seen[pair[0].size, pair[1].size]))
        seen[best[0].size, best[1].size] += 1
        found.append(best)
        left -= _meets(best)
    return found


PAIRS = _all_pairs() if os.environ.get("DTRAIN_MATRIX") == "whole" else _covering()


def test_every_node_and_every_pair_of_strategies_and_of_sizes_is_met() -> None:
    sources, targets = {source for source, _ in PAIRS}, {target for _, target in PAIRS}
    assert sources == targets == set(NODES)
    assert {(source.way, target.way) for source, target in PAIRS} == {(a, b) for a in WAYS for b in WAYS}
    assert {(source.size, target.size) for source, target in PAIRS} == {(a, b) for a in SIZES for b in SIZES}


Save = Callable[[Node], tuple[Path, list[Ran]]]
"""The checkpoint of a node after the sixth step, and all that its twelve steps were."""


def _go(folder: Path, recipe: Recipe, way: str, root: Path, start: Path | None = None, *more: str, size: int,
        noise: bool = False) -> list[Ran]:  # fmt: skip
    typed = overrides(folder, recipe, f"checkpoint.every_steps={recipe.steps // 2}", "checkpoint.at_end=false", *WAYS[way],
                      *more)  # fmt: skip
    return run_ranks(functools.partial(run, noise=noise), folder, _settled(*typed), root, start, size=size)


@functools.cache
def _settled(*typed: str) -> Config:
    return settled(list(typed))


@pytest.fixture(scope="module")
def save(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Each node saves once."""

    @functools.cache
    def saved(node: Node) -> tuple[Path, list[Ran]]:
        root = tmp_path_factory.mktemp("save") / "checkpoints"
        ran = _go(small, RECIPE, node.way, root, size=node.size)
        return root / folder_name(HALF), ran

    return saved


@pytest.fixture(scope="module")
def plain(small: Path) -> Trained:
    """Twelve uninterrupted steps of one plain process."""
    return reference(small, RECIPE)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{source}-{target}" for source, target in PAIRS])
def test_what_one_saves_another_goes_on_from(
    small: Path, save: Save, plain: Trained, tmp_path: Path, source: Node, target: Node
) -> None:
    checkpoint, before = save(source)
    # Micro-batches of up to 3 instead of 2 as well.
    ranks = _go(small, RECIPE, target.way, tmp_path, checkpoint, "batch.micro_batch=3", size=target.size)
    assert_same(whole(ran.first for ran in ranks), whole(ran.saved for ran in before))
    assert rows_of(before)[:HALF] + rows_of(ranks) == plain.ids
    for ran in ranks:
        assert before[0].losses[:HALF] + ran.losses == pytest.approx(plain.losses, rel=1e-5)
        assert before[0].norms[:HALF] + ran.norms == pytest.approx(plain.norms, rel=1e-5)
    last = whole(ran.last for ran in ranks)
    for state, tensors in {"weight": plain.weights, **plain.moments}.items():
        assert set(last[state]) == set(tensors)
        for name, tensor in tensors.items():
            assert difference(last[state][name], tensor) < 1e-5, (state, name)


def assert_same(found: Whole, expected: Whole) -> None:
    """To the last bit."""
    assert {state: set(tensors) for state, tensors in found.items()} == {
        state: set(tensors) for state, tensors in expected.items()
    }
    for state, tensors in expected.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[state][name], tensor, err_msg=f"{state} of {name}")


@pytest.fixture(scope="module")
def dropping(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `small`, of a model with dropout."""
    folder = tmp_path_factory.mktemp("dropping")
    make(folder, dropout=0.2)
    return folder


@pytest.mark.parametrize("node", NODES, ids=str)
def test_the_same_again_is_the_same_to_the_last_bit(dropping: Path, tmp_path: Path, node: Node) -> None:
    # With dropout, and with an objective that draws from Python's and numpy's generators.
    recipe = Recipe(7, steps=6)
    through = _go(dropping, recipe, node.way, tmp_path / "a", size=node.size, noise=True)
    again = _go(dropping, recipe, node.way, tmp_path / "b", tmp_path / "a" / folder_name(3), size=node.size, noise=True)
    for one, other in zip(through, again, strict=True):
        assert (one.losses[3:], one.norms[3:], one.ids[3:]) == (other.losses, other.norms, other.ids)
    assert_same(whole(ran.last for ran in again), whole(ran.last for ran in through))


def test_dropout_and_noise_change_the_loss(small: Path, dropping: Path, tmp_path: Path) -> None:
    # Else nothing above would need the generators' states.
    recipe = Recipe(7, steps=2)
    runs = [_go(folder, recipe, "ddp", tmp_path, size=1, noise=noise)[0].losses[0]
            for folder, noise in ((small, False), (dropping, False), (small, True), (dropping, True))]  # fmt: skip
    assert len(set(runs)) == 4


BF16: Sequence[Pair] = [(Node("zero1", 2), Node("fsdp2", 3)), (Node("fsdp2", 3), Node("zero2-cpu", 2)),
                        (Node("zero2", 3), Node("zero3-divided", 2)), (Node("zero3-cpu", 2), Node("ddp", 3)),
                        (Node("ddp", 2), Node("zero1", 3)), (Node("hsdp", 4), Node("zero3", 1))]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), BF16, ids=[f"{source}-{target}" for source, target in BF16])
def test_in_bf16_masters_and_moments_go_on_exactly(small: Path, tmp_path: Path, source: Node, target: Node) -> None:
    bf16 = "train.precision=bf16"
    before = _go(small, RECIPE, source.way, tmp_path / "a", None, bf16, size=source.size)
    after = _go(small, RECIPE, target.way, tmp_path / "b", tmp_path / "a" / folder_name(HALF), bf16, size=target.size)
    loaded = whole(ran.first for ran in after)
    assert_same(loaded, whole(ran.saved for ran in before))
    assert any((tensor.view(np.uint32) & 0xFFFF).any() for tensor in loaded["weight"].values()), "masters are not bf16"
    # bf16 has 8 bits of mantissa: 2^-8 = 4e-3. Steps of the same arithmetic in another order stay near that.
    assert after[0].losses == pytest.approx(before[0].losses[HALF:], rel=4e-3)
    assert after[0].norms == pytest.approx(before[0].norms[HALF:], rel=4e-2)
