"""Text to plain values: what Hydra composes from `conf/`, the user's folder and the command line. Sole importer of Hydra.

Both `strategy=zero3` and `+strategy=zero3` choose; every other override may set any key, and the schema, not Hydra,
says which keys there are. So all problems can be shown at once, in our words.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError

_KEY = re.compile(r"^(?P<mark>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]+)?(?P<rest>=.*)?$", re.DOTALL)

_EITHER = (("train.steps", "train.epochs"), ("batch.global_batch", "batch.global_tokens"))
"""Two keys for one number: to type one takes back the other's default."""


def conf_dir() -> Path:
    """The configuration that dtrain ships: in the wheel, or beside the package in a checkout."""
    return shared_dir() / "conf"


def shared_dir() -> Path:
    """Where `conf/` and `launch/` are."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_share"
    return shipped if shipped.is_dir() else package.parent


def choices(extra: Path | None = None) -> dict[str, list[str]]:
    """Every group and its choices, sorted."""
    found: dict[str, set[str]] = {}
    for root in [conf_dir(), *([extra] if extra else [])]:
        for path in root.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


@dataclasses.dataclass(frozen=True, slots=True)
class Composed:
    values: dict[str, Any]
    """Plain dicts and lists; interpolations resolved."""
    chosen: dict[str, Any]
    """The choice in each group."""
    problems: list[str]
    """What was typed and cannot be; left out of the rest, so that the rest can be checked too."""


def group_choice(group: str, choice: str, extra: Path | None = None) -> dict[str, Any]:
    """One file of a group, by itself."""
    roots = [root for root in (extra, conf_dir()) if root is not None]
    path = next(path for root in roots if (path := root / group / f"{choice}.yaml").is_file())
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return data


def compose(overrides: Sequence[str], extra: Path | None = None) -> Composed:
    """What the files and the overrides come to. Raises ConfigError."""
    if extra is not None and not extra.is_dir():
        raise ConfigError(f"--config-dir {extra}: no such folder")
    prepared, problems = _prepare(overrides, choices(extra))
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    searchpath = [f"hydra.searchpath=[file://{extra.resolve()}]"] if extra else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*searchpath, *prepared], return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)  # noqa: FBT003
        del composed["hydra"]
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError.of([*problems, _first_lines(error)]) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return Composed({str(key): value for key, value in plain.items()}, chosen, problems)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a `-m` sweep: every combination of `key=a,b`, `key=range(...)`, `key=choice(...)`, `key=glob(*)`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        axes = []
        for one in parsed:
            assert one.input_line is not None
            if one.is_sweep_override():
                key = one.get_key_element()
                axes.append([f"{key}={value}" for value in one.sweep_string_iterator()])
            else:
                axes.append([one.input_line])
    except HydraException as error:
        raise ConfigError(_first_lines(error)) from error
    return [list(combination) for combination in itertools.product(*axes)]


def load_yaml(path: Path) -> Any:
    """A YAML file as plain data; no tag makes an object. Raises ConfigError."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both make plain data only; the first is quicker
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def dump_yaml(data: Any) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def nearest(word: str, words: Sequence[str]) -> str:
    """` did you mean ...?`, or nothing where no word is near."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _prepare(overrides: Sequence[str], groups: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Overrides as Hydra wants them: a group without its plus, any other key forced in; and what is wrong."""
    problems: list[str] = []
    prepared: list[str] = []
    for text in overrides:
        match = _KEY.match(text)
        if match is None or (match["rest"] is None and match["mark"] != "~"):
            problems.append(f"{text}: not an override; write key=value")
            continue
        mark, key, rest = match["mark"] or "", match["key"], match["rest"] or ""
        if mark == "~" or key == "hydra" or key.startswith("hydra."):
            prepared.append(text)
        elif key in groups:
            unknown = _unknown_choices(key, rest[1:], groups[key])
            problems += unknown
            prepared += [] if unknown else [f"{key}{match['package'] or ''}{rest}"]
        else:
            prepared.append(f"++{key}{rest}")
    typed = {text.lstrip("+").split("=", 1)[0] for text in prepared}
    for pair in _EITHER:
        given = [key for key in pair if key in typed]
        if len(given) == 1:
            prepared += [f"++{key}=null" for key in pair if key not in given]
    return prepared, problems


def _unknown_choices(group: str, value: str, names: Sequence[str]) -> list[str]:
    value = value.strip()
    if not value:
        return [f"{group}=: no choice given; there are: {', '.join(names)}"]
    chosen = [name.strip().strip("'\"") for name in value.strip("[]").split(",") if name.strip()]
    return [f"{group}={name}: no such choice{nearest(name, names)} (there are: {', '.join(names)})"
            for name in chosen if name not in names and name != "null"]  # fmt: skip


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
