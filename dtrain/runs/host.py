"""What this machine is called."""

from __future__ import annotations

import os
import socket

HOST = "DTRAIN_HOST"
"""In the environment where a list of hosts has a name for it."""


def host_name() -> str:
    """As the user's list of hosts calls it, where it was started by one; else as it calls itself."""
    return os.environ.get(HOST) or socket.gethostname()
