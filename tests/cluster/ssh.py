"""Machines that are reached by a real ssh: addresses of this one, with a server, keys and settings of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.slurm import daemon, free_ports, until

HOSTS = ("127.0.0.2", "127.0.0.3")
CONF = """\
{listen}
HostKey {dir}/host_key
AuthorizedKeysFile {dir}/authorized_keys
PidFile none
UsePAM no
# The folders above it belong to whoever runs the tests, or to all, as /tmp does.
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


def missing() -> str | None:
    """Why there can be no ssh here; None where there can."""
    lacking = [name for name in ("ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        lacking.append("sshd")
    return f"{', '.join(lacking)} not installed: apt-get install openssh-server pdsh" if lacking else None


@contextmanager
def sshd(folder: Path) -> Iterator[list[str]]:
    """While it runs: what to type to reach `HOSTS`."""
    folder.mkdir(parents=True)
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (port,) = free_ports(1)
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {public}" for host in HOSTS))
    conf = folder / "sshd_config"
    conf.write_text(CONF.format(listen="\n".join(f"ListenAddress {host}:{port}" for host in HOSTS), dir=folder))
    if os.geteuid() == 0:  # where it lives before a user is known
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    out = folder / "sshd.log"
    with daemon(["/usr/sbin/sshd", "-D", "-e", "-f", str(conf)], out, {}):
        until(lambda: out.read_text().count("listening") == len(HOSTS), 60, out.read_text)
        yield [f"launcher.ssh_port={port}", f"launcher.ssh_options={{IdentityFile:{folder}/key,IdentitiesOnly:yes,"
               f"UserKnownHostsFile:{folder}/known_hosts,StrictHostKeyChecking:yes}}"]  # fmt: skip
