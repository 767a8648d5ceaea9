"""The doctor on all nodes at once: a line of each, and which of them is not as the others."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dtrain.doctor.finding import STATES, Finding
from dtrain.errors import ConfigError, RunError

ALIKE = ("versions", "torch", "devices")
"""What should say the same on every node."""
TOGETHER = ("nodes", "clocks", "ranks")
"""What all nodes find out together, and each says."""
SLOW = 0.5
"""Of the middle of the nodes."""


def on_all(args: argparse.Namespace) -> int:
    """The exit code. Raises ConfigError, RunError."""
    from dtrain.plan.propose import configure

    if stray := [one for one in args.overrides if not one.lstrip("+").startswith("launcher.")]:
        raise ConfigError(f"{stray[0]}: not a key of the launcher; only launcher.KEY=VALUE may follow")
    launcher = configure([f"launcher={args.launcher}", *args.overrides], None)[0].launcher
    here = ["doctor", "--json", "--dir", str(args.dir.absolute())]
    chosen = [f"--{key}={value}" for key in ("procs", "only") if (value := getattr(args, key)) is not None]
    argv = launcher.everywhere([*here, *chosen])
    if argv is not None:
        found = _by_one_command(argv)
    elif launcher.calls(here, args.dir):
        from dtrain.verbs._doctor_calls import by_calls

        found = by_calls(launcher, here, args)
    else:
        raise ConfigError(f"--launcher {args.launcher}: it starts no doctor on other machines; type `dtrain "
                          f"doctor --nodes N` on each")  # fmt: skip
    width = max(len(one.name) for one in found)
    for one in found:
        padded = f"{one.state:<5} {one.name:<{width}} {one.text}" + (f": {one.advice}" if one.advice else "")
        print(json.dumps({"name": one.name, "state": one.state, "text": one.text, "advice": one.advice}) if args.json
              else padded)  # fmt: skip
    return int(any(one.state == "fail" for one in found))


def _by_one_command(argv: Sequence[str]) -> list[Finding]:
    """Of what a scheduler's command prints, which starts the doctor on all nodes. Raises RunError."""
    try:
        # What a scheduler says meanwhile, such as that it waits for nodes, is for the user at once.
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        raise RunError(f"{argv[0]}: not found; type this on a machine that has it") from None
    by_node = read(done.stdout.splitlines())
    if not by_node:
        raise RunError(f"{argv[0]}: exit code {done.returncode}, and no node answered")
    found = list(summary(by_node))
    if lost := _expected(argv) - len(by_node):
        found.append(Finding("nodes", "fail", f"{lost} of {_expected(argv)} did not answer",
                             f"look at them, and at what {argv[0]} said"))  # fmt: skip
    return found


def _expected(argv: Sequence[str]) -> int:
    return next((int(word.partition("=")[2]) for word in argv if word.startswith("--nodes=")), 0)


def read(lines: Iterable[str]) -> dict[str, list[Finding]]:
    """What each node found, of the lines of all; what else was printed there is passed over."""
    found: dict[str, list[Finding]] = {}
    for line in lines:
        try:
            said = json.loads(line)
            node = str(said.pop("node"))
            found.setdefault(node, []).append(Finding(**said))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def summary(by_node: Mapping[str, Sequence[Finding]]) -> Iterable[Finding]:
    """A finding of each node, by its name, and what the nodes found together."""
    odd = _unlike(by_node)
    for node in sorted(by_node):
        mine = [one for one in by_node[node] if one.name not in TOGETHER]
        wrong = [one for one in mine if one.state != "ok"] + odd.get(node, [])
        state = max((one.state for one in wrong), key=STATES.index, default=STATES[0])
        text = "; ".join(f"{one.name}: {one.text}" + (f" ({one.advice})" if one.advice else "") for one in wrong)
        yield Finding(node, state, text or ", ".join(one.name for one in mine) or "took part")
    for name in TOGETHER:
        said = [one for node in sorted(by_node) for one in by_node[node] if one.name == name]
        if said:
            yield max(said, key=lambda one: STATES.index(one.state))


def _unlike(by_node: Mapping[str, Sequence[Finding]]) -> dict[str, list[Finding]]:
    """Of each node, what is not as on the others: another text where all should say the same, or half of a figure."""
    odd: dict[str, list[Finding]] = {}
    for name in ALIKE:
        texts = {node: one.text for node, found in by_node.items() for one in found if one.name == name}
        usual, num = Counter(texts.values()).most_common(1)[0] if texts else ("", 0)
        others = f"most have {usual}" if 2 * num > len(texts) else "others have something else"
        for node, text in texts.items():
            if num < len(texts) and (text != usual or 2 * num <= len(texts)):
                odd.setdefault(node, []).append(Finding(name, "warn", f"{text}, and {others}"))
    figures: dict[str, dict[str, float]] = {}
    for node, found in by_node.items():
        for one in found:
            for what, value in one.figures.items():
                figures.setdefault(f"{one.name}: {what}", {})[node] = value
    for what, values in figures.items():
        middle = statistics.median_high(values.values())
        for node, value in values.items():
            if value < SLOW * middle:
                odd.setdefault(node, []).append(Finding("slow", "warn", f"{what} {value:,.0f}, others {middle:,.0f}"))
    return odd
