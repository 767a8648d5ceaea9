"""What ran: versions, source, machine."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dtrain.runs.secrets import redact

_PACKAGES = ("dtrain", "torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy",
             "hydra-core", "wandb", "flash-attn", "liger-kernel")  # fmt: skip


def versions(cwd: Path | None = None) -> dict[str, Any]:
    """For the manifest. Imports none of the packages; asks git about `cwd` for at most a second or two."""
    return {
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": redact(sys.argv),
        "cwd": str(cwd or Path.cwd()),
        "git": _git(cwd or Path.cwd()),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(cwd: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a repository, or where git does not answer."""

    def ask(*argv: str) -> str:
        command = ["git", "--no-optional-locks", *argv]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1, check=True,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
