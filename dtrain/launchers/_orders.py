"""What is said to other machines over ssh, so that nothing which a user typed is read by a shell there.

ssh gives its command to the login shell of the other machine as one text. That text holds the interpreter, PYTHONPATH
where there is one, `-m dtrain node`, the machine's name, and either `-` or letters of base64: the words, the
environment and the folder are in JSON, which goes over stdin, or is those letters.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

from dtrain.errors import ConfigError
from dtrain.launchers._processes import NODE
from dtrain.runs.host import HOST
from dtrain.runs.process import ATTEMPT, MARK
from dtrain.runs.secrets import is_secret_variable, scrub

PASSED = ("CUDA_", "DS_", "DTRAIN_", "FI_", "GLOO_", "HF_", "HUGGING", "KMP_", "LD_LIBRARY_PATH", "MKL_", "NCCL_",
          "OMP_", "PATH", "PYTHON", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCX_", "WANDB_")  # fmt: skip
"""How the names of variables begin that the other machines get too."""
HOSTS = "DTRAIN_HOSTS"
"""Set on each machine that was called: how many there are, which one this is, and how many processes each has."""
OWN = ("CUDA_VISIBLE_DEVICES", MARK, ATTEMPT, NODE, HOST, HOSTS)
"""Those that each machine has its own of."""
MOST_BYTES = 45_000
"""As base64 this is less than what a pipe holds, and than what a system takes as one word of a command."""
_UNSAFE = re.compile(r"[\\!\x00-\x1f\x7f]")
"""What shells read differently within quotes: csh, fish and sh are to find the same word."""
_RUNS_COMMANDS = (
    "include", "knownhostscommand", "localcommand", "match", "permitlocalcommand", "pkcs11provider", "proxycommand",
    "proxyusefdpass", "remotecommand", "securitykeyprovider", "sendenv", "setenv",
)  # fmt: skip
_SSH_VALUE = re.compile(r"[A-Za-z0-9_.,:/@+=~-]+")
_SSH_VALUE_WHOLE = re.compile(r"[A-Za-z0-9_.,:/@+=~% -]+")


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a machine is to do, the same for all."""

    hosts: Mapping[str, Sequence[int] | None]
    """All that take part, the one that leads first; the GPUs to use, None for all."""
    procs: int
    cwd: str
    launch: Sequence[str]
    env: Mapping[str, str]
    control: str
    """A folder of the run where the machine says how it is, and hears of stops."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Orders:
        """Raises ConfigError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"node: not what `dtrain launch` sends: {error}") from error

    def to_word(self) -> str:
        return base64.urlsafe_b64encode(self.to_json().encode()).decode()

    @classmethod
    def from_word(cls, word: str) -> Orders:
        try:
            return cls.from_json(base64.urlsafe_b64decode(word.encode()).decode())
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"node: not what `dtrain launch` sends: {error}") from error


def passed_on(env: Mapping[str, str], extra: Collection[str], *, secrets: bool) -> dict[str, str]:
    """What the other machines get of this one's environment; secrets where they are on their way seen by nobody."""
    found = {
        name: value
        for name, value in env.items()
        if name not in OWN
        and ((secrets and is_secret_variable(name))
             or ((name in extra or name.startswith(PASSED)) and (secrets or not holds_secret(name, env))))
    }  # fmt: skip
    if "PYTHONPATH" in found:  # ssh begins in another folder
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, found["PYTHONPATH"].split(os.pathsep)))
    return found


def holds_secret(name: str, env: Mapping[str, str]) -> bool:
    """By the variable's name, or by its value: an address with a password, or another one's token."""
    return is_secret_variable(name) or scrub(env[name], env) != env[name]


def remote_command(python: str, host: str, orders: str, env: Mapping[str, str]) -> str:
    """What the shell of the other machine reads. `orders`: `-` or `Orders.to_word()`. Raises ConfigError.

    PYTHONPATH is said here, since the interpreter needs it to find dtrain.
    """
    path = env.get("PYTHONPATH", "")
    for what, value in (("launcher.python", python), ("PYTHONPATH", path)):
        if _UNSAFE.search(value) or (what == "launcher.python" and "=" in value):  # `env` would set it as a variable
            raise ConfigError(f"{what}={value!r}: has characters that shells do not agree on; give it another path")
    words = ["env", f"PYTHONPATH={path}"] if path else []
    return shlex.join([*words, python, "-u", "-m", "dtrain", "node", host, orders])


def ssh_problems(options: Mapping[str, str | int], *, spaced: bool) -> list[str]:
    """What is wrong with further options of ssh. `spaced`: they are handed on as one text, in which blanks separate."""
    found = []
    for name, value in options.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", name):
            found.append(f"launcher.ssh_options: {name!r}: not the name of an option of ssh_config, such as User")
        elif name.lower() in _RUNS_COMMANDS:
            found.append(f"launcher.ssh_options: {name}: it has ssh run a command, or read further options; write it "
                         f"into ~/.ssh/config, which is read")  # fmt: skip
        elif not (_SSH_VALUE if spaced else _SSH_VALUE_WHOLE).fullmatch(_ssh_text(value)):
            more = " -, where pdsh hands it on" if spaced else " -, % and blanks"
            found.append(f"launcher.ssh_options: {name}: {value!r} is to be of letters, digits and _ . , : / @ + = ~"
                         f"{more}; write others into ~/.ssh/config, which is read")  # fmt: skip
    return found


def ssh_words(port: int | None, options: Mapping[str, str | int], connect_timeout_s: int) -> list[str]:
    """Options of ssh: what is said first counts."""
    said = [f"Port={port}"] if port is not None else []
    said += [f"{name}={_ssh_text(value)}" for name, value in options.items()]
    said += ["BatchMode=yes", f"ConnectTimeout={connect_timeout_s}", "ConnectionAttempts=1",
             "ServerAliveInterval=10", "ServerAliveCountMax=3"]  # fmt: skip
    return [word for one in said for word in ("-o", one)]


def _ssh_text(value: str | int) -> str:
    """YAML reads yes and no as something else."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
