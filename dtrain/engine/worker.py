"""A rank's life: read what was settled, join the others, build, train, export, and leave word of how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dtrain.config import frozen
from dtrain.engine.state import Progress
from dtrain.plan.world import World
from dtrain.runs import RunDir, die_with_parent, record_failure, redirect


def work(run_dir: Path, *, plugins: Sequence[str]) -> None:
    """Does not return: the process ends here, without the interpreter's teardown, in which torch's process group and
    its users can wait for each other for ever.
    """
    die_with_parent()
    run, attempt = RunDir(run_dir), int(os.environ.get("DTRAIN_ATTEMPT", "0"))
    rank = int(os.environ.get("RANK", "0"))
    stream = redirect(run, attempt, rank)
    faulthandler.enable()
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _stop)
    progress, code = Progress(), 1
    try:
        _work(run, attempt, stream, progress, plugins)
        code = 0
    except BaseException as error:  # noqa: BLE001  the last thing that this process does is to say what it was
        # Each by itself: on a full disk the log takes nothing, and the failure file may still fit.
        with contextlib.suppress(Exception):
            record_failure(run, attempt, rank, error, phase=progress.phase, step=progress.step)
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        for out in (sys.stdout, sys.stderr, stream):
            with contextlib.suppress(Exception):
                out.flush()
        os._exit(code)


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(f"{signal.Signals(signum).name}: told to stop")


def _work(run: RunDir, attempt: int, stream: TextIO, progress: Progress, plugins: Sequence[str]) -> None:
    from dtrain.comm import TorchComm
    from dtrain.data.prepare import read_prepared
    from dtrain.data.store import RowStore
    from dtrain.engine.build import build
    from dtrain.trackers.fan_out import FanOut

    config = frozen.read(run.config, plugins=plugins)
    assert config.device != "auto"
    world = World.from_env(config.device)
    progress.phase = "join"
    comm = TorchComm(world)
    comm.same("digest of config.yaml", frozen.digest(config))
    progress.phase = "load"
    data = run.read_manifest()["data"]
    prepared = read_prepared(Path(data["dir"]), Path(data["assets"]), config.objective)
    rows = (RowStore(prepared.dir / "train.arrow"), RowStore(prepared.dir / "eval.arrow"))
    plain = frozen.to_plain(config)
    trackers = FanOut(spec.build(run.path, plain, stream) for spec in config.tracker.values() if comm.rank == 0)
    built = build(config, world, comm, assets=prepared.assets, rows=rows, pad_id=prepared.pad_id)
    trackers.start(steps=config.train.steps or 0, first_step=0, lines=built.lines)
    if comm.rank == 0:
        run.event("training", attempt=attempt)
    try:
        result = built.engine.run([trackers], progress)
        progress.phase = "export"
        trackers.note(f"exporting to {run.export}")
        built.export(run.export)
        comm.barrier()
    except BaseException as error:
        stopped = isinstance(error, SystemExit)
        if not stopped:  # before the trackers finish, which may take a while; the first record stays
            record_failure(run, attempt, comm.rank, error, phase=progress.phase, step=progress.step)
        trackers.finish(outcome="stopped" if stopped else "failed")
        raise
    message = f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    if result.eval_loss is not None:
        message += f", eval loss {result.eval_loss:.4f}"
    trackers.note(f"done: {message}")
    trackers.finish(outcome="done")
    if comm.rank == 0:
        run.update_manifest(result={"first_loss": result.first_loss, "last_loss": result.last_loss,
                                    "eval_loss": result.eval_loss, "steps": result.steps})  # fmt: skip
        run.write_outcome("done", attempt, step=result.steps, message=message)
    comm.barrier()
