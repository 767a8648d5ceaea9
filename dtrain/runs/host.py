"""What this machine is called, how to tell it from another that is called so too, and a port of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

HOST = "DTRAIN_HOST"
"""In the environment where a list of hosts has a name for it."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def host_name() -> str:
    """As the user's list of hosts calls it, where it was started by one; else as it calls itself."""
    return os.environ.get(HOST) or socket.gethostname()


def free_port() -> int:
    """One that nobody listens at here now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def pids() -> str:
    """Of all processes that know each other by the same pids: those of one start of a machine, or of a container."""
    return _of_kernel("pid")


def network() -> str:
    """Of all processes that mean the same by an address of this machine."""
    return _of_kernel("net")


def _of_kernel(namespace: str) -> str:
    """A name for a namespace of a start of a kernel; empty where the system does not tell."""
    try:
        return f"{_BOOT.read_text(encoding='utf-8').strip()} {Path('/proc/self/ns', namespace).readlink()}"
    except OSError:
        return ""
