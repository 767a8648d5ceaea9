"""`dtrain launch` on each of several machines: one leads, the others start their ranks when it says so."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from typing import TYPE_CHECKING

from dtrain.runs.host import host_name

if TYPE_CHECKING:
    from dtrain.launchers.muster import Follower, Leader
    from dtrain.plan.propose import Proposal
    from dtrain.runs import RunDir
    from dtrain.verbs._told import Wish


def launch(run: RunDir, proposal: Proposal, wish: Wish) -> int:
    """Until the run's end; returns its exit code, on every machine."""
    from dtrain.config import frozen
    from dtrain.errors import ConfigError
    from dtrain.launchers import muster
    from dtrain.runs import check

    gathering, nodes = proposal.config.launcher.gathering(), proposal.plan.topology.nodes
    digest = frozen.digest(proposal.config)
    code: int | None = None
    check(run.checkpoints)
    if gathering.least is not None and (why := proposal.config.strategy.unsavable()) is not None:
        raise ConfigError(f"launcher.nodes: {why}, so that it cannot go on with other machines; type one number, or "
                          f"take another strategy")  # fmt: skip
    while code is None:
        with muster.enter(run, gathering, nodes, digest, _say) as team:
            if isinstance(team, muster.Leader):
                code = _lead(run, proposal, team, wish)
                if code is None:
                    team.send_back()
                else:
                    team.dismiss(code)
            else:
                code = _follow(run, proposal, team, wish)
    return code


def _lead(run: RunDir, proposal: Proposal, leader: Leader, wish: Wish) -> int | None:
    """The run's exit code; None where it is to be started again."""
    from dtrain.plan.describe import describe
    from dtrain.verbs import _restart, launch

    print(describe(proposal.config, proposal.plan), flush=True)
    _say(f"{host_name()} leads")
    with wish.watching(), run.beating():
        prepared, settled = launch.prepare_all(proposal)
    outcome = launch.train(run, proposal, prepared, settled, wish, leader)
    code = launch.tell(outcome, run, settled)
    return None if _restart.again(run, outcome, settled, wish, _say) else code


def _follow(run: RunDir, proposal: Proposal, follower: Follower, wish: Wish) -> int | None:
    """The run's exit code; None where there is nobody to follow."""
    from dtrain.launchers.muster import Over
    from dtrain.launchers.supervise import serve
    from dtrain.verbs.launch import worker

    host = host_name()
    _say(f"{host}: waiting for the node that leads")
    with wish.heeding():
        word = follower.wait()
    if word is None or (isinstance(word, Over) and word.again):
        return None
    if isinstance(word, Over):
        print(word.message or "the node that leads has ended", file=sys.stderr, flush=True)
        return word.exit_code
    _say(f"{host} is node {word.node}; {word.host} leads")
    topology = dataclasses.replace(proposal.plan.topology, nodes=word.nodes)
    command = proposal.config.launcher.command(run.path, worker(run, proposal), topology, follower.meeting(word))
    deadline = None if word.left_s is None else time.time() + word.left_s
    end = serve(command, run, word.attempt, follower, deadline=deadline, hang_after=proposal.config.run.hang_after,
                heed=wish.heed)  # fmt: skip
    follower.report(end)
    with wish.heeding(but=[signal.SIGUSR1]):  # what a scheduler's word is to come to, the leader decides
        over = follower.last_word()
    if over is not None and over.again:
        return None
    if over is None and proposal.config.launcher.gathering().least is not None:
        _say(f"{host}: the node that leads is gone; those that are left meet anew")
        return None
    if over is None:
        print(f"{host}: the node that leads is gone; what was saved before counts", file=sys.stderr, flush=True)
        return proposal.config.launcher.restarts().code or 3
    return over.exit_code


def _say(line: str) -> None:
    print(line, flush=True)
