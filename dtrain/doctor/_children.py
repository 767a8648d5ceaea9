"""Checks in processes of their own: what is wrong with a library may end the process that imports it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.runs.hints import hint_of


class Said(NamedTuple):
    """What a child came to: its one line of JSON, or why there is none."""

    value: dict[str, Any] | None
    why: str = ""
    hint: str = ""


def ask(argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> Said:
    """Run `python -m ARGV`."""
    return ask_all([argv], [env or {}], timeout_s=timeout_s)[0]


def ask_all(argvs: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], *, timeout_s: float) -> list[Said]:
    """The same of several at once. None of them is left."""
    children = [
        subprocess.Popen([sys.executable, "-m", *argv], env={**os.environ, **env}, stdin=subprocess.DEVNULL, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace")
        for argv, env in zip(argvs, envs, strict=True)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout_s
    found = []
    for child in children:
        try:
            out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            found.append(Said(None, f"no answer within {timeout_s:.0f} s"))
            continue
        found.append(_said(child.returncode, out, err))
    return found


def _said(code: int, out: str, err: str) -> Said:
    lines = out.strip().splitlines()
    if code == 0 and lines:
        try:
            return Said(json.loads(lines[-1]))
        except ValueError:
            pass
    last = (err.strip().splitlines() or [""])[-1]
    why = f"killed by {signal.Signals(-code).name}" if code < 0 else last or f"exit code {code}"
    return Said(None, why, hint_of(err) or "")
