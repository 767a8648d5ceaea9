"""Which rank is the odd one, from where all of them are."""

from __future__ import annotations

import dataclasses
import faulthandler
import threading
from pathlib import Path

from dtrain.runs.hang import Stuck, differing, main_thread
from dtrain.runs.pulse import Place

REDUCE = "/env/torch/distributed/distributed_c10d.py:3218 all_reduce"


def stuck(rank: int, where: str, *, step: int = 5, phase: str = "train", stopped: bool = False) -> Stuck:
    return Stuck(Place(rank, 100 + rank, 9, phase, step), "n1", 30.0, stopped, (where, "/src/dtrain/comm.py:98 sum"))


def ranks(found: list[Stuck]) -> list[int]:
    return [one.place.rank for one in found]


def test_the_main_thread_of_what_faulthandler_writes(tmp_path: Path) -> None:
    gate, path = threading.Event(), tmp_path / "stacks"
    thread = threading.Thread(target=gate.wait)
    thread.start()
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    gate.set()
    thread.join()
    frames = main_thread(path.read_text())
    assert frames[0].endswith("test_the_main_thread_of_what_faulthandler_writes")
    assert ":" in frames[0]
    assert main_thread("") == ()


def test_a_halted_process() -> None:
    assert ranks(differing([stuck(0, REDUCE), stuck(1, REDUCE, stopped=True)])) == [1]


def test_one_that_is_in_no_collective() -> None:
    assert ranks(differing([stuck(0, "/home/me/loss.py:12 spin"), stuck(1, REDUCE), stuck(2, REDUCE)])) == [0]
    assert ranks(differing([stuck(0, "/src/dtrain/engine/step.py:60 train_step"), stuck(1, "a.py:1 f")])) == [1]


def test_one_that_is_a_step_behind() -> None:
    assert ranks(differing([stuck(0, REDUCE, step=6), stuck(1, REDUCE, step=5)])) == [1]


def test_one_in_another_phase_or_another_collective() -> None:
    gather = REDUCE.replace("all_reduce", "all_gather")
    assert ranks(differing([stuck(0, REDUCE), stuck(1, REDUCE), stuck(2, gather)])) == [2]
    assert ranks(differing([stuck(0, REDUCE, phase="eval"), stuck(1, REDUCE), stuck(2, REDUCE)])) == [0]


def test_none_where_all_are_alike_or_nobody_can_tell() -> None:
    assert differing([stuck(0, REDUCE), stuck(1, REDUCE)]) == []
    assert differing([stuck(0, REDUCE), stuck(1, REDUCE, phase="eval")]) == []


def test_one_that_got_on_when_it_noticed_that_others_were_ended_is_not_waited_for() -> None:
    noticed = dataclasses.replace(stuck(0, "plot.py:23 draw", phase="end"), stale_s=0.0)
    assert ranks(differing([noticed, stuck(1, "failpoints.py:43 reach")])) == [1]
    assert ranks(differing([noticed, stuck(1, REDUCE), stuck(2, "a.py:1 spin")])) == [2]
