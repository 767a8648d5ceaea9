"""Names and addresses of machines."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress

NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")
"""What may stand for a machine in a command: never an option, never anything that a shell, ssh or pdsh would read."""
HOST = re.compile(rf"{NAME.pattern}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
"""The same, or an address of IPv6."""


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's."""
    if host in (socket.gethostname(), socket.getfqdn(), socket.gethostname().split(".")[0]):
        return True
    mine = set(_interfaces())
    with suppress(OSError):
        return any(ipaddress.ip_address(found[4][0].split("%")[0]) in mine for found in _resolve(host))
    return False


def towards(host: str) -> str | None:
    """The address of this machine by which `host` would see it come; None where there is no way to it."""
    for family, kind, proto, _, address in _resolve(host):
        with suppress(OSError), socket.socket(family, kind, proto) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    return None


def interface_of(address: str) -> str | None:
    """The network interface with this address."""
    with suppress(ValueError):
        return _interfaces().get(ipaddress.ip_address(address.split("%")[0]))
    return None


def _resolve(host: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(*one[:4], one[4]) for one in found]


def _interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    import psutil

    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            with suppress(ValueError):
                found[ipaddress.ip_address(one.address.split("%")[0])] = name
    return found
