"""A checkpoint that turns out not to be what was written while the shards are filled from it leaves no trace in them."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.storage import WEIGHT, file_name
from dtrain.errors import CheckpointError
from tests.contract.saved import Whole, copies, run, whole
from tests.contract.small import Recipe, Record, make, make_built, overrides, settled
from tests.contract.test_resume import WAYS, assert_same
from tests.processes import run_ranks

RECIPE = Recipe(7, steps=6)
NEWER, OLDER = folder_name(4), folder_name(2)


class WentOn(NamedTuple):
    said: list[str]
    first: list[Any]
    """This rank's pieces before its first step."""
    losses: list[float]
    norms: list[float]


def _go_on(folder: Path, typed: list[str], candidates: list[Path]) -> WentOn:
    from dtrain.engine.state import Progress

    said: list[str] = []
    built, record = make_built(folder, typed, resume=candidates, note=said.append), Record()
    first = copies(built.strategy.shards())
    built.engine.run([record], Progress())
    return WentOn(said, first, [r.loss for r in record.reports], [r.grad_norm for r in record.reports])


def _flip(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 8
    path.write_bytes(raw)


def _replace(path: Path, before: bytes, after: bytes) -> None:
    raw = path.read_bytes()
    assert before in raw
    path.write_bytes(raw.replace(before, after, 1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte of data of the last": lambda root: _flip(root / file_name(2), 0.7),
    "last byte of the first": lambda root: _flip(root / file_name(0), 1),
    "length of a header": lambda root: _flip(root / file_name(1), 0),
    "place of a piece, in a header": lambda root: _replace(root / file_name(1), b',0":', b'-0":'),
    "shorter by now": lambda root: os.truncate(root / file_name(1), (root / file_name(1)).stat().st_size // 2),
    "longer by now": lambda root: os.truncate(root / file_name(1), (root / file_name(1)).stat().st_size + 4),
    "gone by now": lambda root: (root / file_name(2)).unlink(),
    "manifest": lambda root: _flip(root / manifest.NAME, 0.5),
}
NAMED = {"first byte of data of the last": 2, "last byte of the first": 0, "gone by now": 2}


@pytest.fixture(scope="module")
def saved(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by zero2 on 3 ranks."""
    root = tmp_path_factory.mktemp("walk") / "checkpoints"
    typed = overrides(small, RECIPE, "strategy=zero2", "checkpoint.every_steps=2", "checkpoint.keep_last=9",
                      "checkpoint.at_end=false", "checkpoint.async=false")  # fmt: skip
    run_ranks(_save, small, typed, root, size=3)
    return root


def _save(folder: Path, typed: list[str], root: Path) -> None:
    run(folder, settled(typed), root, None, noise=False)


@functools.cache
def _older(small: Path, saved: Path, *typed: str) -> list[WentOn]:
    """From the older one alone."""
    return run_ranks(_go_on, small, overrides(small, RECIPE, *typed), [saved / OLDER], size=2)


def _both(small: Path, root: Path, *typed: str) -> list[WentOn]:
    """From both, where the newer is damaged."""
    return run_ranks(_go_on, small, overrides(small, RECIPE, *typed), [root / NEWER, root / OLDER], size=2)


def _assert_went_on_from_the_older(older: list[WentOn], both: list[WentOn]) -> None:
    assert_same(_whole(both), _whole(older))
    for one, other in zip(both, older, strict=True):
        assert other.said == []
        assert len(one.losses) == RECIPE.steps - 2
        assert (one.losses, one.norms) == (other.losses, other.norms)


def _whole(ranks: list[WentOn]) -> Whole:
    return whole(one.first for one in ranks)


@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_is_filled_again_from_the_one_before(small: Path, saved: Path, tmp_path: Path, way: str) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    _flip(root / NEWER / file_name(2), 0.9)
    both = _both(small, root, *WAYS[way])
    _assert_went_on_from_the_older(_older(small, saved, *WAYS[way]), both)
    for one in both:
        assert one.said == [one.said[0]]
        assert f"passed over {root / NEWER}: {root / NEWER / file_name(2)}: its content differs" in one.said[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_wrong_is_told_by_all_ranks(small: Path, saved: Path, tmp_path: Path, damage: str) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    DAMAGES[damage](root / NEWER)
    both = _both(small, root, "strategy=zero2")
    _assert_went_on_from_the_older(_older(small, saved, "strategy=zero2"), both)
    file = manifest.NAME if damage == "manifest" else file_name(NAMED.get(damage, 1))
    assert [len(one.said) for one in both] == [1, 1]
    assert len({one.said[0] for one in both}) == 1
    assert f"resume: passed over {root / NEWER}: {root / NEWER / file}: " in both[0].said[0]


BLIND: dict[str, tuple[object, str]] = {
    "manifest": (Path, "read_bytes"), "headers": (Path, "open"), "data": (os, "preadv"), "all but headers": (os, "open"),
}  # fmt: skip


def _go_on_blind(folder: Path, typed: list[str], candidates: list[Path], what: str) -> WentOn:
    """Where rank 1 alone cannot read the first candidate."""
    of, name = BLIND[what]
    real = getattr(of, name)

    def fail(first: Any, *rest: Any, **named: Any) -> Any:
        path = Path(os.readlink(f"/proc/self/fd/{first}")) if isinstance(first, int) else Path(first)
        if path.parent == candidates[0] and path.name != file_name(1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(first, *rest, **named)

    if os.environ["RANK"] == "1":
        setattr(of, name, fail)
    return _go_on(folder, typed, candidates)


@pytest.mark.parametrize("what", BLIND)
def test_what_one_rank_cannot_read_is_passed_over_by_all(small: Path, saved: Path, what: str) -> None:
    options = overrides(small, RECIPE, "strategy=ddp")
    both = run_ranks(_go_on_blind, small, options, [saved / NEWER, saved / OLDER], what, size=2)
    _assert_went_on_from_the_older(_older(small, saved, "strategy=ddp"), both)
    assert [one.said for one in both] == [both[0].said] * 2
    assert f"passed over {saved / NEWER}: " in both[0].said[0]
    assert "cannot be read" in both[0].said[0]
    assert "Input/output error" in both[0].said[0]


def test_where_streams_were_is_read_by_all_or_none(tmp_path: Path) -> None:
    """Each rank looks for that in all files, also in those of which it needs nothing else."""
    make(tmp_path, vocab=300)
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{i} the cat sat"}}\n' for i in range(64)))
    typed = overrides(tmp_path, RECIPE, "strategy=zero2", "checkpoint.every_steps=2", "checkpoint.keep_last=9",
                      "checkpoint.at_end=false", "checkpoint.async=false")  # fmt: skip
    root = tmp_path / "checkpoints"
    run_ranks(_save, tmp_path, typed, root, size=2)
    older = run_ranks(_go_on, tmp_path, typed, [root / OLDER], size=2)
    both = run_ranks(_go_on_blind, tmp_path, typed, [root / NEWER, root / OLDER], "all but headers", size=2)
    _assert_went_on_from_the_older(older, both)
    assert f"{root / NEWER / file_name(0)}: cannot be read (Input/output error)" in both[0].said[0]


def _misfit(folder: Path, typed: list[str], candidates: list[Path]) -> str:
    with pytest.raises(CheckpointError) as raised:
        _go_on(folder, typed, candidates)
    return str(raised.value)


def test_what_was_passed_over_is_told_where_the_next_one_does_not_fit(small: Path, saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    (root / NEWER / file_name(0)).unlink()
    typed = overrides(small, RECIPE, "strategy=zero2", "tuning=lora")
    told = run_ranks(_misfit, small, typed, [root / NEWER, root / OLDER], size=2)
    assert told[0] == told[1]
    assert f"{root / OLDER}: not of this model:" in told[0]
    assert f"before it, passed over:\n  {root / NEWER / file_name(0)}: " in told[0]


def _none_is_left(folder: Path, typed: list[str]) -> tuple[Any, ...]:
    """State that was made, looked at and filled, and then made as before the first update."""
    from dtrain.engine.state import Progress

    built, record = make_built(folder, typed), Record()
    with torch.no_grad():
        built.strategy.restore({**built.strategy.counters(), "updates": 3})
        for shard in built.strategy.shards():
            assert len(shard.views) > 1
            for name, view in shard.views.items():
                if name != WEIGHT:
                    view.fill_(5.0)
        built.strategy.restore({**built.strategy.counters(), "updates": 0})
    left = {name for shard in built.strategy.shards() for name in shard.views}
    updates = built.strategy.counters()["updates"]
    built.engine.run([record], Progress())
    return left, updates, [r.loss for r in record.reports], copies(built.strategy.shards())


def _fresh(folder: Path, typed: list[str]) -> tuple[Any, ...]:
    from dtrain.engine.state import Progress

    built, record = make_built(folder, typed), Record()
    built.engine.run([record], Progress())
    return [r.loss for r in record.reports], copies(built.strategy.shards())


@pytest.mark.parametrize("way", [*WAYS, "adamw8bit"])
def test_nothing_is_left_of_state_that_was_there_too_early(small: Path, way: str) -> None:
    """As where a run in fp16, none of whose first gradients were finite, goes back to before its first update."""
    typed = overrides(small, RECIPE, *WAYS.get(way, ("strategy=fsdp2", f"optim={way}")))
    if way == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    found = run_ranks(_none_is_left, small, typed, size=2)
    for (left, updates, losses, last), (expected, ends) in zip(
        found, run_ranks(_fresh, small, typed, size=2), strict=True
    ):
        assert (left, updates) == ({WEIGHT}, 0)
        assert losses == expected
        for one, other in zip(last, ends, strict=True):
            assert one.views.keys() == other.views.keys()
            assert all(np.array_equal(one.views[name], other.views[name]) for name in one.views), one.name
