"""How an attempt ended, from what its processes left; and in words."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from dtrain.launchers._torchrun import Exit, first_exits
from dtrain.runs import Failure, Outcome, RunDir, first_failure

_LINES = 30
_WHY = {
    "SIGKILL": "the system ran out of memory, or someone killed it",
    "SIGSEGV": "a crash in native code; the log has the Python stack",
    "SIGBUS": "often a full /dev/shm",
    "SIGABRT": "native code gave up; the log says why",
    "SIGTERM": "someone asked it to stop",
}


@dataclasses.dataclass(frozen=True, slots=True)
class NodeEnd:
    """How the ranks of one machine ended, as the launcher there saw it."""

    host: str
    returncode: int | None
    told: int | None = None
    """The signal that asked for a stop."""
    forced: bool = False
    """By a second one, at once."""
    exits: tuple[Exit, ...] = ()
    """Of ranks that a signal ended, but for those that the launcher itself killed."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NodeEnd:
        return cls(**{**fields, "exits": tuple(Exit(**one) for one in fields["exits"])})

    @classmethod
    def of(cls, log: Path, returncode: int | None, *, told: int | None = None, forced: bool = False,
           ended: Collection[int] = (), first_rank: int = 0) -> NodeEnd:  # fmt: skip
        """From torchrun's log; `ended`: pids of ranks that this launcher killed for another's failure."""
        exits = [exit_ for exit_ in first_exits(log, first_rank) if exit_.code < 0 and exit_.pid not in ended]
        return cls(socket.gethostname(), returncode, told, forced, tuple(exits))


def judge(run: RunDir, attempt: int, *, returncode: int | None, told: int | None = None, forced: bool = False,
          ended: Collection[int] = ()) -> Outcome:  # fmt: skip
    """Decide how an attempt on one machine ended, and write it unless rank 0 has.

    `told`: the signal that asked for a stop; `ended`: pids of ranks that the launcher killed for another's failure.
    """
    log = run.launcher_log(attempt)
    return judge_all(run, attempt, [NodeEnd.of(log, returncode, told=told, forced=forced, ended=ended)])


def judge_all(run: RunDir, attempt: int, ends: Sequence[NodeEnd], *, trouble: str | None = None) -> Outcome:
    """The same from how it ended on each machine, this one first; `trouble`: what became of one that says nothing."""
    returncode = ends[0].returncode
    if len(ends) == 1:
        ends = [_alone(ends[0], run, attempt)]
    told = next((end.told for end in ends if end.told is not None), None)
    forced = any(end.forced for end in ends)
    failures = run.failures(attempt)
    if told is not None:
        failures = [failure for failure in failures if failure.type not in ("KeyboardInterrupt", "SystemExit")]
    asked = {signal.SIGTERM, told}
    killed = [_as_failure(run, attempt, exit_, end.host) for end in ends for exit_ in end.exits
              if -exit_.code not in asked]  # fmt: skip
    first = _first(failures, killed)
    recorded = run.read_outcome(attempt)
    if recorded is not None and recorded.state != "failed" and (first is None or first.secondary):
        return recorded
    if forced:
        message = "ended at once by a second signal"
        return run.write_outcome("interrupted", attempt, message=message)
    if told is not None and (first is None or first.secondary):
        name = signal.Signals(told).name
        message = f"{name} stopped it before a save; what was saved before counts"
        return run.write_outcome("stopped", attempt, message=message, reason=name)
    if trouble is not None and (first is None or first.secondary):
        return run.write_outcome("launcher", attempt, message=trouble)
    if first is not None:
        return run.write_outcome(first.kind, attempt, step=first.step, message=first.message, failure=first)
    return run.write_outcome("launcher", attempt, message=_launcher_message(run, attempt, returncode))


def _alone(end: NodeEnd, run: RunDir, attempt: int) -> NodeEnd:
    """The same of a single rank, which was started without torchrun."""
    code = end.returncode
    if end.exits or code is None or code >= 0 or not run.log(attempt, 0).exists() or run.log(attempt, 1).exists():
        return end
    return dataclasses.replace(end, exits=(Exit(rank=0, local_rank=0, code=code, pid=-1),))


def _first(failures: Sequence[Failure], killed: Iterable[Failure]) -> Failure | None:
    """The cause among files and signals. A kill is never an echo; an abort may be one, of a rank that failed before."""
    killed = list(killed)
    own = [failure for failure in failures if not failure.secondary]
    order = [
        *(failure for failure in own if failure.kind != "worker"),
        *(failure for failure in killed if failure.type != "SIGABRT"),
        *own,
        *killed,
    ]
    return order[0] if order else first_failure(failures)


def _as_failure(run: RunDir, attempt: int, exit_: Exit, host: str) -> Failure:
    name = exit_.signal_name or ""
    why = _WHY.get(name, "")
    log = run.log(attempt, exit_.rank).relative_to(run.path).as_posix()
    return Failure(rank=exit_.rank, host=host, local_rank=exit_.local_rank, phase="", step=None,
                   kind="worker", type=name, message=f"killed by {name}" + (f" ({why})" if why else ""), traceback="",
                   time_ns=time.time_ns(), log=log)  # fmt: skip


def _launcher_message(run: RunDir, attempt: int, returncode: int | None) -> str:
    if returncode == 0:
        return "the processes ended without saying how"
    how = f"exit code {returncode}" if returncode is None or returncode >= 0 else signal.Signals(-returncode).name
    return f"the processes could not be started, or ended before they could write a log ({how})"


def explain(outcome: Outcome, run: RunDir) -> str:
    """What to print at the end: nothing of note for a run that is done; else the cause, the log, what to type next.

    The last line alone names cause, rank and next command.
    """
    if outcome.kind == "done":
        return f"done: {run.path}"
    if outcome.kind == "stopped":
        at = f" at step {outcome.step}" if outcome.step is not None else f": {outcome.message}"
        return f"stopped{at}; the same command goes on from its newest checkpoint: {run.path}"
    failure = outcome.failure
    if failure is None:
        launcher_log = run.launcher_log(outcome.attempt)
        text = [] if outcome.kind == "interrupted" else _tail(launcher_log)
        return "\n".join([*text, f"{outcome.kind}: {outcome.message}; next: less {shlex.quote(str(launcher_log))}"])
    if failure.kind == "user":
        return failure.message
    place = [f"rank {failure.rank} on {failure.host}"]
    place += [f"in {failure.phase}"] if failure.phase else []
    place += [f"at step {failure.step}"] if failure.step is not None else []
    summary = failure.message.strip().splitlines()
    cause = f"{failure.type}: {summary[0] if summary else ''}" if failure.traceback else (summary or [failure.type])[0]
    log = shlex.quote(str(run.path / failure.log))
    lines = [*_short(failure.traceback), f"{' '.join(place)}: {cause}; next: less {log}"]
    return "\n".join(lines)


def _short(traceback: str) -> list[str]:
    lines = traceback.rstrip().splitlines()
    if len(lines) <= _LINES:
        return lines
    return [lines[0], f"  ... {len(lines) - _LINES} lines left out; the log has them", *lines[-_LINES:]]


def _tail(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_LINES:]
    except OSError:
        return []
