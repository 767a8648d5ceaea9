"""`dtrain launch` where the ranks are on other machines, which are called from here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.config.spec import Call
    from dtrain.plan.propose import Proposal
    from dtrain.runs import RunDir


def launch(run: RunDir, proposal: Proposal, words: Sequence[str]) -> int:
    """Until the run's end; returns its exit code."""
    from dtrain.errors import RunError
    from dtrain.launchers import afar
    from dtrain.runs import check
    from dtrain.verbs.launch import say

    check(run.path)
    if (holder := run.holder()) is not None:
        raise RunError(f"{run.path} is in use by {holder}; type another run.name, or `dtrain runs stop` it first")
    with afar.control_folder(run) as control:
        calls = proposal.config.launcher.calls(words, control)
        for line in _left_out(calls):
            say(line)
        say(f"calling {', '.join(name for call in calls for name in call.hosts)} by {calls[0].command.argv[0]}")
        return afar.see_through(control, calls, say)


def show(run: RunDir, proposal: Proposal, words: Sequence[str]) -> int:
    """The plan, what is started here, and what is said there."""
    from dtrain.plan.describe import describe

    print(describe(proposal.config, proposal.plan), flush=True)
    calls = proposal.config.launcher.calls(words, run.nodes / "CONTROL")
    for call in calls:
        env = [f"{key}={shlex.quote(value)}" for key, value in call.command.env.items()]
        print("command    " + " ".join([*env, shlex.join(call.command.argv)]))
    print("which has each machine type:")
    print(f"           cd {shlex.quote(str(Path.cwd()))} && dtrain {shlex.join(words)}")
    names = sorted(json.loads(calls[0].told)["env"])
    print(f"with these variables of here, beside its own: {' '.join(names)}")
    for line in _left_out(calls):
        print(line)
    return 0


def _left_out(calls: Sequence[Call]) -> list[str]:
    names = sorted({name for call in calls for name in call.left_out})
    return [f"without {', '.join(names)}: others could read them in the words of {calls[0].command.argv[0]}; "
            f"launcher.by=ssh passes them on unseen"] if names else []  # fmt: skip
