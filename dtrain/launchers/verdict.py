"""How an attempt ended, from what its processes left; and in words."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from dtrain.launchers._torchrun import Exit, first_exits
from dtrain.runs import Failure, Outcome, RunDir, first_failure
from dtrain.runs.hang import Stuck, differing, read_hang
from dtrain.runs.hints import hint, hint_of
from dtrain.runs.host import host_name
from dtrain.runs.outcomes import JOINED, LEFT
from dtrain.runs.pulse import Place

_LINES = 30
_LOOKED_AT = 300
"""Of a log's last lines, for a known cause: torch says what it was at the top of a chain of tracebacks."""
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
    places: tuple[Place, ...] = ()
    """Where the ranks were that did not end by themselves."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NodeEnd:
        return cls(**{**fields, "exits": tuple(Exit(**one) for one in fields["exits"]),
                      "places": tuple(Place.from_dict(one) for one in fields["places"])})  # fmt: skip

    @classmethod
    def of(cls, log: Path, returncode: int | None, *, told: int | None = None, forced: bool = False,
           ended: Collection[int] = (), first_rank: int = 0, places: Iterable[Place] = ()) -> NodeEnd:  # fmt: skip
        """From torchrun's log; `ended`: pids of ranks that this launcher killed for another's failure."""
        exits = [exit_ for exit_ in first_exits(log, first_rank) if exit_.code < 0 and exit_.pid not in ended]
        return cls(host_name(), returncode, told, forced, tuple(exits), tuple(places))


def judge(run: RunDir, attempt: int, *, returncode: int | None, told: int | None = None, forced: bool = False,
          ended: Collection[int] = ()) -> Outcome:  # fmt: skip
    """Decide how an attempt on one machine ended, and write it unless rank 0 has.

    `told`: the signal that asked for a stop; `ended`: pids of ranks that the launcher killed for another's failure.
    """
    log = run.launcher_log(attempt)
    return judge_all(run, attempt, [NodeEnd.of(log, returncode, told=told, forced=forced, ended=ended)])


def judge_all(run: RunDir, attempt: int, ends: Sequence[NodeEnd], *, trouble: str | None = None,
              lost: str | None = None) -> Outcome:  # fmt: skip
    """The same from how it ended on each machine, this one first; `trouble`: what another has met; `lost`: which have
    said nothing.
    """
    returncode = ends[0].returncode
    if len(ends) == 1:
        ends = [_alone(ends[0], run, attempt)]
    told = next((end.told for end in ends if end.told is not None), None)
    forced = any(end.forced for end in ends)
    failures = run.failures(attempt)
    if told is not None:
        failures = [failure for failure in failures if failure.type not in ("KeyboardInterrupt", "SystemExit")]
    asked = {signal.SIGTERM, told}
    killed = [_as_failure(run, attempt, exit_, end) for end in ends for exit_ in end.exits
              if -exit_.code not in asked]  # fmt: skip
    recorded = run.read_outcome(attempt)
    hung = read_hang(run, attempt) if told is None and (recorded is None or recorded.state == "failed") else []
    first = _hang_failure(hung) if hung else _first(failures, killed)
    if recorded is not None and recorded.state != "failed" and (first is None or first.secondary):
        return _stopped_for(run, recorded, lost, told) if recorded.state == "stopped" else recorded
    if forced:
        message = "ended at once by a second signal"
        return run.write_outcome("interrupted", attempt, message=message)
    if told is not None and (first is None or first.secondary):
        name = signal.Signals(told).name
        message = f"{name} stopped it before a save; what was saved before counts"
        return run.write_outcome("stopped", attempt, message=message, reason=name)
    elsewhere = lost or trouble
    if elsewhere is not None and (first is None or first.secondary):
        return run.write_outcome("launcher" if lost is None else "lost", attempt, message=elsewhere)
    if first is not None:
        return run.write_outcome(first.kind, attempt, step=first.step, message=first.message, failure=first)
    return run.write_outcome("launcher", attempt, message=_launcher_message(returncode))


def _stopped_for(run: RunDir, recorded: Outcome, lost: str | None, told: int | None) -> Outcome:
    """As it was recorded, but for a stop that nobody asked for, since the ranks of a launcher that is killed are told
    to, and for one that was asked for while all saved for another machine: it would go on with that.
    """
    if recorded.reason == JOINED and told is not None:
        why = reason = signal.Signals(told).name
    elif recorded.reason == "SIGTERM" and told is None and lost is not None:
        why, reason = lost, LEFT
    else:
        return recorded
    message = f"{why}; {recorded.message}"
    return run.write_outcome("stopped", recorded.attempt, step=recorded.step, message=message, reason=reason)


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


def _as_failure(run: RunDir, attempt: int, exit_: Exit, end: NodeEnd) -> Failure:
    name = exit_.signal_name or ""
    why = _WHY.get(name, "")
    log = run.log(attempt, exit_.rank).relative_to(run.path).as_posix()
    place = next((one for one in end.places if one.rank == exit_.rank), None)
    phase, step, rows = ("", None, ()) if place is None else (place.phase, place.step, place.rows)
    return Failure(rank=exit_.rank, host=end.host, local_rank=exit_.local_rank, phase=phase, step=step,
                   kind="worker", type=name, message=f"killed by {name}" + (f" ({why})" if why else ""), traceback="",
                   time_ns=time.time_ns(), log=log, rows=rows)  # fmt: skip


def _hang_failure(ranks: Sequence[Stuck]) -> Failure:
    """Of the rank that the others waited for, or of the first where none differs."""
    odd = differing(ranks)
    shown = odd or ranks
    long_s = min((one.stale_s for one in ranks if one.stale_s), default=0.0)
    words = f"no rank got on for {long_s:.0f} s"
    words += "; this one differs from the others" if odd and len(odd) < len(ranks) else ""
    first = shown[0]
    lines = [one.line() for one in [*odd, *(one for one in ranks if one not in odd)][:_LINES]]
    return Failure(rank=first.place.rank, host=first.host, local_rank=-1, phase=first.place.phase,
                   step=first.place.step, kind="hang", type="hang", message=f"{words}: {_inside(first)}",
                   traceback="\n".join(lines), time_ns=time.time_ns(), log=first.stacks,
                   rows=first.place.rows)  # fmt: skip


def _inside(one: Stuck) -> str:
    return "its process is halted (SIGSTOP)" if one.stopped else one.line().partition(", ")[2]


def _launcher_message(returncode: int | None) -> str:
    if returncode == 0:
        return "the processes ended without saying how"
    how = f"exit code {returncode}" if returncode is None or returncode >= 0 else signal.Signals(-returncode).name
    return f"the processes could not be started, or ended before they could write a log ({how})"


def explain(outcome: Outcome, run: RunDir) -> str:
    """What to print at the end: nothing of note for a run that is done; else the cause, the log, what to type next.

    The last line alone names cause, rank and next command.
    """
    if outcome.kind == "done":
        return f"run        {run.path}"
    if outcome.kind == "stopped" and outcome.reason == JOINED:
        return f"{JOINED}: saved at step {outcome.step}"
    if outcome.kind == "stopped":
        at = f" at step {outcome.step}" if outcome.step is not None else f": {outcome.message}"
        return f"stopped{at}; the same command goes on from its newest checkpoint: {run.path}"
    failure = outcome.failure
    if failure is None:
        launcher_log = run.launcher_log(outcome.attempt)
        text = [] if outcome.kind == "interrupted" else _tail(launcher_log)
        known = hint_of("\n".join(_tail(launcher_log, _LOOKED_AT) if text else []))
        hints = [f"hint: {known}"] if known else []
        last = f"{outcome.kind}: {outcome.message}; next: less {shlex.quote(str(launcher_log))}"
        return "\n".join([*text, *hints, last])
    if failure.kind == "user":
        return failure.message
    place = [f"rank {failure.rank} on {failure.host}"]
    place += [f"in {failure.phase}"] if failure.phase else []
    place += [f"at step {failure.step}"] if failure.step is not None else []
    summary = failure.message.strip().splitlines()
    cause = f"{failure.type}: {summary[0] if summary else ''}" if failure.traceback else (summary or [failure.type])[0]
    log = shlex.quote(str(run.path / failure.log))
    rows = [f"rows: {', '.join(map(str, failure.rows))} of the prepared data"] if failure.rows else []
    known = known_cause(outcome, run)
    hints = [f"hint: {known}"] if known else []
    return "\n".join([*_short(failure.traceback), *rows, *hints, f"{' '.join(place)}: {cause}; next: less {log}"])


def known_cause(outcome: Outcome, run: RunDir) -> str | None:
    """What to do about a rank's failure, where the cause is a known one."""
    failure = outcome.failure
    if failure is None:
        return None
    entry: dict[str, Any] = next(
        (one for one in run.read_manifest().get("attempts", []) if one["attempt"] == outcome.attempt), {}
    )
    micro_batch = entry.get("micro_batch")
    log = "\n".join(_tail(run.path / failure.log))
    return hint(failure, log, micro_batch=micro_batch if isinstance(micro_batch, int) else None)


def _short(traceback: str) -> list[str]:
    lines = traceback.rstrip().splitlines()
    if len(lines) <= _LINES:
        return lines
    return [lines[0], f"  ... {len(lines) - _LINES} lines left out; the log has them", *lines[-_LINES:]]


def _tail(log: Path, lines: int = _LINES) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-lines:]
    except OSError:
        return []
