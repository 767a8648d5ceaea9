"""Start a run's processes, pass signals on, and see that all of them end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

from dtrain.config.spec import Command
from dtrain.launchers import _hang, _torchrun
from dtrain.launchers._processes import NODE, sweep, workers
from dtrain.launchers._watch import HangAfter, Watch
from dtrain.launchers.verdict import NodeEnd, judge_all
from dtrain.runs import Outcome, RunDir, die_with_parent
from dtrain.runs.beside import SAME_PRESS_S, caught
from dtrain.runs.lock import BEAT_S
from dtrain.runs.process import ATTEMPT, DEADLINE, MARK
from dtrain.runs.pulse import FOLDER, Place

POLL_S = 0.1
OTHERS_S = 1.5
"""After a first failure, what the other ranks get to write their own end."""
STOPPING_S = 20.0
"""The same where the ranks were told to stop, or there are no others."""
REPORT_S = 2.0
"""After that, what torchrun gets to say who was killed."""
TEAM_S = 1.0
"""How often the run's folder is looked at for what other machines say."""
WATCH_S = 0.5
"""How often is looked where the ranks are."""
OTHERS_LOOK_S = 20.0
"""After a hang, what other machines get to write down where their ranks are, which fail once ours have ended."""
SHOW_CURSOR = "\x1b[?25h"


class AbstractTeam(Protocol):
    """Other machines of the run, seen from this one."""

    @property
    def node(self) -> int: ...

    @property
    def nodes(self) -> int:
        """Machines that take part."""

    @property
    def token(self) -> str:
        """A random name of this launcher."""

    def beat(self) -> None:
        """Show the others that this one lives."""

    def trouble(self) -> str | None:
        """Why this machine's ranks are to be ended; None where all is well."""

    def lost(self) -> str | None:
        """Machines that do not say how they ended, and nothing else either; None where none is."""

    def come(self) -> str | None:
        """The host of a further machine, for which the run is to save and all to meet anew; None where none is."""


class AbstractLeader(AbstractTeam, Protocol):
    def reports(self, *, failed: bool) -> list[NodeEnd]:
        """How the ranks of the others ended."""


def supervise(  # noqa: PLR0913 - what a start can have beside its command
    command: Command,
    run: RunDir,
    attempt: int,
    *,
    note: Callable[[str], None] | None = None,
    limit_s: float | None = None,
    hang_after: HangAfter = "auto",
    team: AbstractLeader | None = None,
    heed: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run the command to its end and say how it ended, here and on the other machines of `team`; writes that to the
    run folder too.

    Its stdout is ours, its stderr goes to launcher.log. The first SIGINT, SIGTERM or SIGUSR1 is passed on to the ranks,
    a second SIGINT or SIGTERM ends them at once. When one rank fails, the others are ended within seconds; when none
    gets on for as long as `hang_after` says, their stacks are written down first. Nothing that was started is alive on
    return. `heed` is called once signals are taken here, and raises where one came before. To be called in the main
    thread.
    """
    command = _timed(command, deadline_of(limit_s))
    job = _see_through(_Job(command, run, attempt, note or _to_stderr, hang_after, team), heed)
    others = [] if team is None else team.reports(failed=bool(job.returncode))
    lost = None if team is None else team.lost()
    return judge_all(run, attempt, [job.end(), *others], trouble=job.trouble, lost=lost)


def serve(command: Command, run: RunDir, attempt: int, team: AbstractTeam, *, deadline: float | None = None,
          hang_after: HangAfter = "auto", heed: Callable[[], None] = lambda: None) -> NodeEnd:  # fmt: skip
    """The same on a machine that follows: it leaves the verdict to the one that leads."""
    return _see_through(_Job(_timed(command, deadline), run, attempt, _to_stderr, hang_after, team), heed).end()


def deadline_of(limit_s: float | None) -> float | None:
    """By the clock, when the ranks are to have saved and ended: `limit_s` from now, or earlier where a batch script
    says when its job is over.
    """
    ends = [float(os.environ[DEADLINE])] if os.environ.get(DEADLINE) else []
    ends += [] if limit_s is None else [time.time() + limit_s]
    return min(ends, default=None)


def _timed(command: Command, deadline: float | None) -> Command:
    """With the time by which rank 0, wherever it is, keeps the run."""
    if deadline is None:
        return command
    return Command(command.argv, {**command.env, DEADLINE: f"{deadline:.0f}"})


def _see_through(job: _Job, heed: Callable[[], None]) -> _Job:
    with caught(job.on_signal):
        try:
            heed()
            job.start()
            job.wait()
        finally:
            job.clean_up()
    return job


def end_left(run: RunDir) -> int:
    """End what a launcher that was killed has left running here, once it had the time to save; returns how many that
    were. To be called by the holder of the run's lock.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_places_of(run)}*"):
        shutil.rmtree(left, ignore_errors=True)
    return sweep(run.path, patience_s=STOPPING_S)


def _places_of(run: RunDir) -> str:
    """How the names of folders begin in which its ranks say where they are."""
    return f"dtrain-ranks-{hashlib.sha256(os.fsencode(run.path)).hexdigest()[:12]}-"


def _to_stderr(line: str) -> None:
    # On a terminal the run's own lines are redrawn in place, two of them: step out of their way.
    sys.stderr.write(f"\n{line}\n\n" if sys.stderr.isatty() else line + "\n")


class _Job:
    """One started command."""

    def __init__(self, command: Command, run: RunDir, attempt: int, note: Callable[[str], None],
                 hang_after: HangAfter, team: AbstractTeam | None) -> None:  # fmt: skip
        self.command, self.run, self.attempt, self.note, self.team = command, run, attempt, note, team
        self.pulses = Path(tempfile.mkdtemp(prefix=_places_of(run)))
        """Where the ranks say where they are: on this machine's own disk."""
        self.watch = Watch(self.pulses, hang_after)
        self.places: list[Place] = []
        """Where they were when they ended."""
        self.log = run.launcher_log(attempt, team.node if team else 0)
        self.trouble: str | None = None
        """What another machine has met, for which this one's ranks were ended."""
        self.first_rank = 0
        """Of this machine."""
        self.process: subprocess.Popen[bytes] | None = None
        self.told: int | None = None
        """The first signal that asked for a stop."""
        self.forced = False
        self.ended: set[int] = set()
        """Ranks that we killed, by pid."""
        self._told_at = 0.0
        self._passed_to: set[int] = set()
        self._failed_at: float | None = None
        self._beat_at = self._team_at = self._watched_at = time.monotonic()
        self._hung_at: float | None = None
        self._stopping = False
        self._first_known = team is None

    @property
    def returncode(self) -> int | None:
        return None if self.process is None else self.process.returncode

    @property
    def _alone(self) -> bool:
        """Started without torchrun: the process is the only rank, and its children are its own helpers."""
        return "RANK" in self.command.env

    @property
    def _patience_s(self) -> float:
        """A rank that stops, or has no others to wait for, may finish what it tells its trackers."""
        return STOPPING_S if self._alone or self.told is not None else OTHERS_S

    def _is_written_down(self) -> bool:
        """Whether a hang is by all machines that take part, or the others had their time for it."""
        if self._hung_at is None:
            return False
        if self.team is None or time.monotonic() - self._hung_at > OTHERS_LOOK_S:
            return True
        return len(list(self.run.hang_dir(self.attempt).glob("node-*.json"))) >= self.team.nodes

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Only takes note: the loop acts."""
        now = time.monotonic()
        if self.told is None or self.told == signal.SIGUSR1:
            self.told, self._told_at = signum, now
            self._passed_to.clear()
        elif signum != signal.SIGUSR1 and now - self._told_at > SAME_PRESS_S:
            self.forced = True

    def start(self) -> None:
        env = {**os.environ, **self.command.env, MARK: str(self.run.path), ATTEMPT: str(self.attempt),
               FOLDER: str(self.pulses)}  # fmt: skip
        if self.team is not None:
            env[NODE] = self.team.token
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                list(self.command.argv),
                env=env,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on once
                preexec_fn=_end_with_us,
            )

    def wait(self) -> None:
        assert self.process is not None
        while True:
            try:
                self.process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                self._look()
            else:
                return

    def _look(self) -> None:
        assert self.process is not None
        if self.forced or self._is_written_down():
            self.process.kill()
            return
        if self.told is not None:
            self._pass_on(self.told)
        now = time.monotonic()
        if self.team is not None and now - self._team_at > TEAM_S:
            self._team_at = now
            self._look_at_team(self.team, self.process.pid)
        elif self.team is None and now - self._beat_at > BEAT_S:
            self._beat_at = now
            self.run.beat()
        if now - self._watched_at > WATCH_S:
            self._watched_at = now
            self._look_at_ranks()
        if self._failed_at is None:
            failed = self.run.failures(self.attempt) or _torchrun.is_closing(self.log) or self.trouble
            self._failed_at = now if failed else None
        elif now - self._failed_at > self._patience_s + REPORT_S:
            self.process.kill()
        elif now - self._failed_at > self._patience_s and not self._alone:
            for rank in workers(self.process.pid).values():
                self.ended.add(rank.pid)
                rank.kill()

    def _look_at_ranks(self) -> None:
        """A hang here, or one that another machine has found, is written down; it ends the ranks."""
        if self._hung_at is not None:
            return
        stale = self.watch.look()
        elsewhere = self.team is not None and self.run.hang_dir(self.attempt).is_dir()
        if (stale or elsewhere) and self._failed_at is None:
            node = self.team.node if self.team else 0
            _hang.record(self.run, self.attempt, node, self.pulses, self.watch.places(), stale)
            self._hung_at = time.monotonic()

    def _look_at_team(self, team: AbstractTeam, agent: int) -> None:
        team.beat()
        if self.trouble is None and (trouble := team.trouble()) is not None:
            self.trouble, self._watched_at = trouble, 0.0
        if self.trouble is None and self.run.read_outcome(self.attempt) is not None:
            self.trouble = team.lost()  # torchrun would wait for it for minutes
        if not self._stopping and (host := team.come()) is not None:
            with contextlib.suppress(OSError):  # of a full disk: it is tried again, and the run goes on meanwhile
                self.run.joined.touch()
                self._stopping = True
                self.note(f"{host} has come: the run saves, and all meet anew")
        if not self._first_known and (ranks := workers(agent)):
            self.first_rank, self._first_known = min(ranks), True

    def _pass_on(self, signum: int) -> None:
        """To the ranks rather than to torchrun, which would give them little time; also to ranks that come later."""
        assert self.process is not None
        if not self._passed_to:
            name = signal.Signals(signum).name
            self.note(f"{name}: the run saves and stops; again: at once")
        signum = signal.SIGTERM if signum == signal.SIGHUP else signum
        ranks = set() if self._alone else {rank.pid for rank in workers(self.process.pid).values()}
        ranks = ranks or {self.process.pid}
        for pid in ranks - self._passed_to:
            self._passed_to.add(pid)
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue

    def end(self) -> NodeEnd:
        return NodeEnd.of(self.log, self.returncode, told=self.told, forced=self.forced, ended=self.ended,
                          first_rank=self.first_rank, places=self.places)  # fmt: skip

    def clean_up(self) -> None:
        """Leave no process and no hidden cursor behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.places = self.watch.places()
        shutil.rmtree(self.pulses, ignore_errors=True)
        sweep(self.run.path, patience_s=0.2 if self.forced or self.returncode else 2.0,
              node=self.team.token if self.team else None)  # fmt: skip
        if sys.stdout.isatty():
            sys.stdout.write(SHOW_CURSOR)
            sys.stdout.flush()


def _end_with_us() -> None:
    """Called in the new process. Slurm sends SIGUSR1 to every process of a step, and torchrun would end of it: it is
    held back until a rank takes it.
    """
    die_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
