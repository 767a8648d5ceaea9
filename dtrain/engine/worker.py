"""A rank's life: read what was settled, join the others, build, train, export, and leave word of how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dtrain.config import frozen
from dtrain.engine.control import SIGNALS, Control
from dtrain.engine.state import Progress
from dtrain.engine.watched import Watched
from dtrain.plan.world import World
from dtrain.runs import RunDir, die_with_parent, record_failure, redirect, spare_a_file
from dtrain.runs.process import ATTEMPT, DEADLINE

if TYPE_CHECKING:
    from dtrain.checkpoint.saver import Saved
    from dtrain.comm import AbstractComm
    from dtrain.config.schema import Config
    from dtrain.engine.build import Built
    from dtrain.engine.engine import Result, Saving
    from dtrain.engine.rescue import AbstractRescue
    from dtrain.trackers.fan_out import FanOut


SLOW_BYTES_PER_S = 5e8
"""Of a file system that many write to at once: what a first save is guessed by."""

SEEN_S = 30.0
"""What a network file system gets to show to all ranks what one has written."""


def work(run_dir: Path, *, plugins: Sequence[str]) -> None:
    """Does not return: the process ends here, without the interpreter's teardown, in which torch's process group and
    its users can wait for each other for ever.
    """
    die_with_parent()
    run, attempt = RunDir(run_dir), int(os.environ.get(ATTEMPT, "0"))
    rank = int(os.environ.get("RANK", "0"))
    stream = redirect(run, attempt, rank)
    faulthandler.enable()
    spare_a_file()
    told: list[int] = []
    for signum in SIGNALS:
        signal.signal(signum, lambda number, frame: told.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which the launcher holds back for torchrun's sake
    progress, code = Progress(), 1
    watched = Watched(rank, progress)
    progress.at("init")
    try:
        _work(run, attempt, stream, progress, plugins, told)
        code = 0
    except BaseException as error:  # noqa: BLE001  the last thing that this process does is to say what it was
        # Each by itself: on a full disk the log takes nothing, and the failure file may still fit.
        with contextlib.suppress(Exception):
            _record_failure(run, attempt, rank, error, progress)
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        watched.end()
        for out in (sys.stdout, sys.stderr, stream):
            with contextlib.suppress(Exception):
                out.flush()
        os._exit(code)


def _work(run: RunDir, attempt: int, stream: TextIO, progress: Progress, plugins: Sequence[str],
          told: list[int]) -> None:  # fmt: skip
    from dtrain.comm import TorchComm
    from dtrain.data.prepared import FILES, read_prepared
    from dtrain.engine import rehearsal
    from dtrain.engine.build import build
    from dtrain.trackers.fan_out import FanOut

    config = frozen.read(run.config, plugins=plugins)
    assert config.device != "auto"
    world = World.from_env(config.device)
    comm = TorchComm(world)
    comm.same("digest of config.yaml", frozen.digest(config))
    _shared(run, comm)
    progress.at("load")
    manifest = run.read_manifest()
    data = manifest["data"]
    prepared = read_prepared(Path(data["dir"]), Path(data["assets"]), config.objective, wait_s=SEEN_S)
    rows = rehearsal.worst((prepared.train_rows(config.dataset, config.run.seed), prepared.rows(FILES[1])))
    plain = frozen.to_plain(config)
    trackers = FanOut(spec.build(run.path, plain, stream) for spec in config.tracker.values() if comm.rank == 0)
    passed_over: list[str] = []

    def note(line: str) -> None:
        passed_over.append(line)
        if comm.rank == 0:  # at once: what comes next may fail
            run.event("passed over", attempt=attempt, line=line)

    built = build(config, world, comm, assets=prepared.assets, rows=rows, pad_id=prepared.pad_id,
                  resume=[Path(one) for one in manifest.get("resume") or []], note=note,
                  mark=lambda: progress.at("load"), cache=Path(data["dir"]).parent)  # fmt: skip
    instead = [f"resume: going on from step {built.step} instead"] if passed_over else []
    trackers.start(steps=config.train.steps or 0, first_step=built.step, lines=[*built.lines, *passed_over, *instead])
    if comm.rank == 0:
        _began(run, attempt, built)
    try:
        saving = _saving(run, attempt, built, manifest["identity"])
        result = built.engine.run([trackers, *rehearsal.stops(comm.rank, comm.size)], progress, saving,
                                  _control(run, config, comm, told), _rescue(run, attempt, config))  # fmt: skip
        if result.stopped is None:
            progress.at("export")
            trackers.note(f"exporting to {run.export}")
            built.export(run.export, manifest["identity"].get("base"), lambda: progress.at("export"))
        comm.barrier()
    except BaseException as error:
        # Before the trackers finish, which may take a while; the first record stays.
        _record_failure(run, attempt, comm.rank, error, progress)
        progress.at("end")
        trackers.finish(outcome="failed")
        raise
    progress.at("end")
    _end(run, attempt, result, trackers, comm)


def _began(run: RunDir, attempt: int, built: Built) -> None:
    """Write what the launcher could not know: also from which step, where a checkpoint was passed over."""
    run.add_attempt(attempt, first_step=built.step)
    run.update_manifest(attention=dataclasses.asdict(built.attention), loss=dataclasses.asdict(built.loss))
    run.event("training", attempt=attempt, step=built.step)


def _record_failure(run: RunDir, attempt: int, rank: int, error: BaseException, progress: Progress) -> None:
    record_failure(run, attempt, rank, error, phase=progress.phase, step=progress.step, rows=progress.rows)


def _end(run: RunDir, attempt: int, result: Result, trackers: FanOut, comm: AbstractComm) -> None:
    """Say how it ended. Collective."""
    from dtrain.data.counts import Counts

    state = result.state
    if state.stream is not None:
        counts = Counts(dict(state.stream["counts"]))
        if counts.reasons:
            trackers.note(f"data: of the windows that are through, {counts.lines()[0]}")
        if comm.rank == 0:
            run.update_manifest(stream={"counts": counts.reasons, "consumed": state.stream["consumed"]})
    if result.stopped is not None:
        kind, message = "stopped", f"{result.stopped}: stopped after step {state.step}"
    else:
        kind, message = "done", f"loss {state.first_loss:.4f} -> {state.last_loss:.4f}"
        if state.eval_loss is not None:
            message += f", eval loss {state.eval_loss:.4f}"
    trackers.note(message if kind == "stopped" else f"done: {message}")
    trackers.finish(outcome=kind)
    if comm.rank == 0:
        if kind == "done":
            run.update_manifest(result={"first_loss": state.first_loss, "last_loss": state.last_loss,
                                        "eval_loss": state.eval_loss, "steps": state.step})  # fmt: skip
        run.write_outcome(kind, attempt, step=state.step, message=message, reason=result.stopped or "")
    comm.barrier()


def _shared(run: RunDir, comm: AbstractComm) -> None:
    """Raise unless a file that rank 0 makes now is seen by all: checkpoints are written by all into one folder.
    Collective.
    """
    import secrets
    import time

    from dtrain.errors import RunError

    path = run.checkpoints / f".tmp-seen-{comm.gather(secrets.token_hex(8))[0]}"
    if comm.rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    comm.barrier()
    deadline = time.monotonic() + SEEN_S
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208  has some of them look again
    blind = [rank for rank, said in enumerate(comm.gather(str(int(seen)))) if said == "0"]
    if comm.rank == 0:
        path.unlink(missing_ok=True)
    if blind:
        raise RunError(f"run.dir: ranks {blind[:8]} do not see what rank 0 writes to {path.parent}; run.dir must be on "
                       f"a file system that all nodes share")  # fmt: skip


def _saving(run: RunDir, attempt: int, built: Built, identity: dict[str, object]) -> Saving | None:
    """What the loop saves with; None where the strategy has nothing that can be saved. Collective."""
    from dtrain.checkpoint.saver import Saver
    from dtrain.engine.engine import Saving

    if built.config.strategy.unsavable() is not None:
        return None
    policy = built.config.checkpoint
    num_bytes = sum(one.num_bytes for one in built.parameters.values())
    said = run.read_manifest()
    made_by = {key: said.get(key) for key in ("name", "strategy", "size", "device", "packages", "python", "git")}
    return Saving(
        saver=Saver(run.checkpoints, policy, built.comm.sibling()),
        describe=built.describe(identity, {**made_by, "attempt": attempt}),
        every_steps=policy.every_steps,
        at_end=policy.at_end,
        stop_on_error=policy.on_error == "stop",
        guess_s=num_bytes / SLOW_BYTES_PER_S,
        told=lambda saved: _record(run, attempt, saved) if built.comm.rank == 0 else None,
    )


def _rescue(run: RunDir, attempt: int, config: Config) -> AbstractRescue:
    from dtrain.engine.rescue import NO_RESCUE, Rescue

    if config.train.on_oom == "stop":
        return NO_RESCUE
    word = run.attempt_dir(attempt) / "out-of-memory.json"
    return Rescue(word, lambda: bool(run.failures(attempt)), lambda: os._exit(1))


def _record(run: RunDir, attempt: int, saved: Saved) -> None:
    fields = {"attempt": attempt, "step": saved.step, "pause_s": saved.pause_s, "write_s": saved.write_s}
    if saved.error is None:
        problem = {} if saved.problem is None else {"problem": saved.problem}
        run.event("saved", **fields, bytes=saved.num_bytes, removed=list(saved.removed), **problem)
    else:
        run.event("save failed", **fields, error=saved.error)


def _control(run: RunDir, config: Config, comm: AbstractComm, told: list[int]) -> Control:
    """Takes over the signals, with what came before."""
    import time

    if comm.rank == 0:
        deadline = os.environ.get(DEADLINE)
        left = None if deadline is None else float(deadline) - time.time()
        control = Control(trigger=run.save_trigger, stop_trigger=run.stop_trigger, joined=run.joined,
                          every_minutes=config.checkpoint.every_minutes, time_left_s=left)  # fmt: skip
    else:
        control = Control()
    for signum in SIGNALS:
        signal.signal(signum, control.on_signal)
    for number in told:
        control.on_signal(number, None)
    return control
