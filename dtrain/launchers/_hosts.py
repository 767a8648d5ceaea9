"""The machines of a hostfile, and those of them that are to be used, in DeepSpeed's words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.launchers._network import NAME

_LINE = re.compile(r"(\S+)\s+slots=(\d{1,4})(\s+#.*)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    name: str
    slots: tuple[int, ...]
    """Which of its GPUs, one for each process; on CPU only how many counts."""
    whole: bool
    """Whether those are all that the hostfile gives it."""


def read(path: Path) -> dict[str, int]:
    """The slots of each machine. Raises ConfigError with every line that is not `NAME slots=N`."""
    if str(path) in ("???", "."):
        raise ConfigError(
            "launcher.hostfile: say where the list of machines is, a line for each, as `worker-1 slots=8`"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # an editor may have put a mark before the text
    except UnicodeDecodeError as error:
        raise ConfigError(f"launcher.hostfile={str(path)!r}: not text in UTF-8 ({error}); save it as that") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"launcher.hostfile={str(path)!r}: {error}") from error
    found: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        where = f"launcher.hostfile={str(path)!r}, line {number}: {text!r}"
        if match is None:
            problems.append(f"{where}: not as `worker-1 slots=8`")
        elif not NAME.fullmatch(match[1]):
            problems.append(
                f"{where}: not the name or IPv4 address of a machine; a user is named by "
                f"'launcher.ssh_options={{User:NAME}}', an address of IPv6 by a name in ~/.ssh/config"
            )
        elif match[1] in found:
            problems.append(f"{where}: this machine is named twice")
        elif int(match[2]) == 0:
            problems.append(f"{where}: no slots; leave the line out")
        else:
            found[match[1]] = int(match[2])
    if problems:
        raise ConfigError.of(problems)
    if not found:
        raise ConfigError(f"launcher.hostfile={str(path)!r}: names no machine; a line for each, as `worker-1 slots=8`")
    return found


def choose(there: Mapping[str, int], include: str, exclude: str) -> list[Host]:
    """Those to use, in the hostfile's order. `include` and `exclude` are `NAME[:SLOT,...]@...`, one of them empty.

    Raises ConfigError.
    """
    if include and exclude:
        raise ConfigError(f"launcher.include={include} and launcher.exclude={exclude}: one or the other")
    named = _named(there, "include" if include else "exclude", include or exclude)
    hosts = []
    for name, count in there.items():
        mine = named.get(name, [])
        slots = tuple(mine if include else [one for one in range(count) if one not in mine])
        if slots:
            hosts.append(Host(name, slots, whole=len(slots) == count))
    if not hosts:
        raise ConfigError(f"launcher.exclude={exclude}: no machine is left of {', '.join(there)}")
    return hosts


def _named(there: Mapping[str, int], key: str, text: str) -> dict[str, list[int]]:
    """The slots that are named of each machine; all where none is."""
    found: dict[str, set[int]] = {}
    problems = []
    for part in text.split("@") if text else []:
        name, colon, slots = part.partition(":")
        if name not in there:
            problems.append(f"launcher.{key}: {name!r} is not in the hostfile; there are: {', '.join(there)}")
        elif not colon:
            found.setdefault(name, set()).update(range(there[name]))
        elif not re.fullmatch(r"\d{1,4}(,\d{1,4})*", slots):
            problems.append(f"launcher.{key}: {part!r}: not as NAME:0,1")
        elif beyond := [one for one in map(int, slots.split(",")) if one >= there[name]]:
            problems.append(f"launcher.{key}: {part!r}: {name} has slots 0 to {there[name] - 1}, and no {beyond[0]}")
        else:
            found.setdefault(name, set()).update(map(int, slots.split(",")))
    if problems:
        raise ConfigError.of(problems)
    return {name: sorted(slots) for name, slots in found.items()}
