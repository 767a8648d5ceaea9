"""The doctor on machines that are called one by one, as by ssh: first each by itself, then all together."""

from __future__ import annotations

import argparse
import secrets
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.doctor.finding import Finding
from dtrain.verbs._doctor_nodes import read, summary

if TYPE_CHECKING:
    from dtrain.config.spec import LauncherSpec
    from dtrain.runs import RunDir

WITHIN_S = 600.0
"""What the checks of a machine get: each has a limit of its own."""


def by_calls(launcher: LauncherSpec, here: Sequence[str], args: argparse.Namespace) -> list[Finding]:
    """What each machine found, or why it did not answer; and what they found together, which takes all of them. `here`:
    the doctor's words but for what it is to look at.
    """
    from dtrain.doctor.checks import CHECKS
    from dtrain.plan.machine import look
    from dtrain.runs import RunDir, check

    names = list(CHECKS) if args.only is None else args.only.split(",")
    procs = args.procs or launcher.topology("cpu", look()).procs_per_node
    run = RunDir(args.dir / f".doctor-{secrets.token_hex(4)}")
    check(run.path)
    try:
        # Those that are asked together would wait long for one that does not come.
        alone = [name for name in names if name != "ranks"] or ["versions"]
        by_node = _ask(launcher, run, [*here, f"--procs={procs}", f"--only={','.join(alone)}"])
        silent = [node for node, found in by_node.items() if any(one.name == "call" for one in found)]
        if "ranks" in names and not silent:
            together = _ask(launcher, run, [*here, f"--procs={procs}", "--only=ranks", f"--nodes={len(by_node)}"])
            by_node = {node: [*found, *together[node]] for node, found in by_node.items()}
        found = list(summary(by_node))
        if "ranks" in names and silent:
            found.append(Finding("ranks", "fail", f"not measured without {', '.join(silent)}", "see above"))
        return found
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def _ask(launcher: LauncherSpec, run: RunDir, words: Sequence[str]) -> dict[str, list[Finding]]:
    from dtrain.launchers import afar

    lines: dict[str, list[str]] = {}
    with afar.control_folder(run) as control:
        calls = launcher.calls(words, control)
        why = afar.ask(control, calls, lambda node, line: lines.setdefault(node, []).append(line), WITHIN_S)
    said = {node: next(iter(read(lines.get(node, [])).values()), []) for node in why}
    advice = "look at it by hand: ssh, the interpreter and the folders there"
    return {node: [*said[node], *([Finding("call", "fail", text.removeprefix(f"{node}: "), advice)] if text else [])]
            for node, text in why.items()}  # fmt: skip
