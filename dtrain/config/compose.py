"""Text to plain values: what Hydra composes from `conf/`, the user's folder and what was typed. Sole importer of Hydra.

Both `strategy=zero3` and `+strategy=zero3` choose; every other override may set any key, and the schema, not Hydra,
says which keys there are. So all problems can be shown at once, in our words.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError

_KEY = re.compile(r"^(?P<mark>\+\+|\+|~)?(?P<key>[^=@\s]{1,200})(?P<package>@[^=]*)?(?P<rest>=.*)?$", re.DOTALL)
_STRUCTURE = re.compile(r"[\[\]{}()'\"$,\\]")
"""Characters that mean something in Hydra's grammar; a value without any is a number, a word or plain text."""

_EITHER = (("train.steps", "train.epochs"), ("batch.global_batch", "batch.global_tokens"))
"""Two keys for one number: to type one takes back the other's default."""
_IMPLIED = {
    "dataset.path": ("dataset", "files"),
    "dataset.sources": ("dataset", "mixture"),
    "model.path": ("model", "hf"),
}
"""Keys that are typed for one choice only: to type one chooses it, unless the group is chosen otherwise."""
_FILE = ", or, for a file of them, FOLDER/experiment/NAME.yaml, --config-dir FOLDER experiment=NAME"
_SHORT = {"resume": "resume.path"}
"""What may be typed for a key that stands in a section."""


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
    found: dict[str, set[str]] = {group: set() for group in defaults()}
    for root in [conf_dir(), *([extra] if extra else [])]:
        for path in root.glob("*/*.yaml"):
            if not path.parent.name.startswith("."):
                found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


@functools.cache
def defaults() -> Mapping[str, Any]:
    """The groups that every run has, and what each is when nothing is typed: a choice, a list of them, or None."""
    entries = load_yaml(conf_dir() / "config.yaml")["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Composed:
    values: dict[str, Any]
    """Plain dicts and lists; interpolations resolved."""
    chosen: dict[str, Any]
    """The choice in each group."""
    problems: list[str]
    """What was typed and cannot be; left out of the rest, so that the rest can be checked too."""


def group_choice(group: str, choice: str, extra: Path | None = None) -> dict[str, Any]:
    """One choice of a group, with the values of its file. Raises ConfigError."""
    path = next(path for root in (conf_dir(), extra) if root and (path := root / group / f"{choice}.yaml").is_file())
    text = path.read_text(encoding="utf-8")
    if "defaults:" in text or "${" in text:  # it builds on others: only Hydra can say what it comes to
        data = compose([f"{group}={choice}"], extra).values[group]
    else:
        data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return data


def compose(overrides: Sequence[str], extra: Path | None = None) -> Composed:
    """What the files and the overrides come to. Raises ConfigError where nothing can be composed at all."""
    _check_folder(extra)
    prepared, problems = _prepare(overrides, choices(extra))
    prepared += _implied(prepared, extra)
    try:
        plain, chosen = _compose(prepared, extra)
    except ConfigError as error:
        readable = [text for text in prepared if not _unreadable(text)]
        if readable == prepared:
            raise ConfigError.of([*problems, str(error)]) from error
        problems += [f"{text.removeprefix('++')}: {_unreadable(text)}" for text in prepared if text not in readable]
        try:
            plain, chosen = _compose(readable, extra)
        except ConfigError as second:
            raise ConfigError.of([*problems, str(second)]) from second
    for group in plain.keys() & chosen.keys() - (defaults().keys() - {"experiment"}):
        del plain[group]
        if chosen[group] is None:
            problems.append(f"{group}: a group, chosen as a whole by {group}=NAME; its keys go where they belong")
            continue
        problems.append(f"{group}={chosen[group]}: its file sets keys outside of its own group, so its first line must "
                        f"be `# @package _global_`")  # fmt: skip
    return Composed(plain, chosen, problems)


def _check_folder(extra: Path | None) -> None:
    """Raises ConfigError where a folder of the user's has what would be passed over."""
    if extra is None:
        return
    if not extra.is_dir():
        raise ConfigError(f"--config-dir {extra}: no such folder")
    problems = [f"{path}: dtrain has a choice of this name, which would be taken; give yours another name"
                for path in sorted(extra.glob("*/*.yaml"))
                if (conf_dir() / path.parent.name / path.name).is_file()
                and not extra.samefile(conf_dir())]  # fmt: skip
    if (extra / "config.yaml").is_file() and not extra.samefile(conf_dir()):
        problems.append(f"{extra / 'config.yaml'}: is never read; put these keys into "
                        f"{extra / 'experiment' / 'NAME.yaml'} and type experiment=NAME")  # fmt: skip
    if problems:
        raise ConfigError.of(problems)


def _compose(prepared: Sequence[str], extra: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values, and the choice of each group. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    searchpath = [f"hydra.searchpath=['file://{extra.resolve()}']"] if extra else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*searchpath, *prepared], return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)  # noqa: FBT003
        del composed["hydra"]
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError,
            AttributeError) as error:  # fmt: skip
        raise ConfigError(_in_words(error)) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, {str(key): value for key, value in chosen.items()}


def sweep(overrides: Sequence[str], extra: Path | None = None) -> list[list[str]]:
    """The runs of a `-m` sweep: every combination of `key=a,b`, `key=range(...)`, `key=choice(...)`, `group=glob(*)`.

    What cannot be read is passed on, for `compose` to tell of with the rest.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, axes = OverridesParser.create(), []
    for text in overrides:
        try:
            one = parser.parse_override(text)
            axes.append(_values(one, text, extra) if one.is_sweep_override() else [text])
        except (HydraException, AttributeError):
            axes.append([text])
    return [list(combination) for combination in itertools.product(*axes)]


def _values(one: Any, text: str, extra: Path | None) -> list[str]:
    """An override for each value of a sweep. Raises ConfigError."""
    from hydra.core.override_parser.types import Glob

    key, value = one.get_key_element(), one.value()
    if isinstance(value, Glob):
        names = choices(extra).get(key.lstrip("+"))
        if names is None:
            raise ConfigError(
                f"{text}: glob() is for groups, such as strategy=glob(*); list the values, as in {key}=1,2"
            )
        found = value.filter(names)
    elif one.is_discrete_sweep():
        found = list(one.sweep_string_iterator())
    else:
        raise ConfigError(f"{text}: a run is for one value; list them, as in {key}=1,2 or {key}=range(1,4)")
    if not found:
        raise ConfigError(f"{text}: this comes to no value at all")
    return [f"{key}={each}" for each in found]


def load_yaml(path: Path) -> Any:
    """A YAML file as plain data; no tag makes an object. Raises ConfigError."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both make plain data only; the first is quicker
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def dump_yaml(data: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Text of several lines as it is read."""

        def represent_text(self, text: str) -> yaml.ScalarNode:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, Dumper.represent_text)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def nearest(word: str, words: Sequence[str]) -> str:
    """` did you mean ...?`, or nothing where no word is near."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _prepare(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Overrides as Hydra wants them: a group without its plus, any other key forced in; and what is wrong."""
    problems: list[str] = []
    prepared: list[str] = []
    for text in overrides:
        match = _KEY.match(text)
        if match is None or (match["rest"] is None and match["mark"] != "~"):
            problems.append(f"{clip(text)}: not an override; write key=value{_FILE * text.endswith(('.yaml', '.yml'))}")
            continue
        mark, key, value = match["mark"] or "", match["key"], (match["rest"] or "")[1:]
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            problems.append(f"{clip(text)}: Hydra composes here and runs nothing, so this would do nothing; the run "
                            f"folder is run.dir/run.name, your own choices come by --config-dir")  # fmt: skip
        elif match["package"] is not None:
            problems.append(f"{clip(text)}: a group has one place; type {key}={value}")
        elif key in groups:
            wrong, choice = _choose(key, None if mark == "~" else value, groups[key])
            problems += wrong
            prepared += choice
        elif mark == "~":
            prepared.append(text)
        else:
            prepared.append(f"++{_SHORT.get(key, key)}={_quoted(value)}")
    typed = {key.lstrip("+") for key, _, value in (text.partition("=") for text in prepared) if value != "null"}
    for pair in _EITHER:
        given = [key for key in pair if key in typed]
        if len(given) == 1:
            prepared += [f"++{key}=null" for key in pair if key not in given]
    return prepared, problems


def _implied(prepared: Sequence[str], extra: Path | None) -> list[str]:
    typed = dict(one.lstrip("+").partition("=")[::2] for one in prepared)
    return [f"{group}={choice}" for key, (group, choice) in _IMPLIED.items()
            if any(one == key or one.startswith(f"{key}.") for one in typed)
            and group not in typed and not _chooses(typed, group, extra)]  # fmt: skip


def _chooses(typed: Mapping[str, str], group: str, extra: Path | None) -> bool:
    """Whether a file that was typed, such as an experiment, chooses of this group."""
    paths = [root / typed_group / f"{choice}.yaml" for root in (conf_dir(), extra) if root
             for typed_group, choice in typed.items() if defaults().get(typed_group) is None]  # fmt: skip
    return any(
        re.search(rf"override\s+/{group}\b", path.read_text(encoding="utf-8")) for path in paths if path.is_file()
    )


def _choose(  # noqa: PLR0911 - one for each way to choose wrongly
    group: str, value: str | None, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What is wrong with a choice, or the override that makes it; None is `~group`."""
    there = f"there are: {', '.join(names) or 'none'}"
    known = defaults()
    many, optional = isinstance(known.get(group), list), known.get(group) is None
    value = "null" if value is None else value.strip()
    if value == "null":
        if many:
            return [], [f"{group}=[]"]
        return ([], []) if optional else ([f"{group}=null: one must be chosen; {there}"], [])
    if not value:
        return [f"{group}=: no choice given; {there}"], []
    if not many and (value[0] in "[{" or "," in value):
        return [f"{group}={clip(value)}: takes one choice; for a run of each of several type -m and {group}=a,b"], []
    if many and "," in value and value[0] != "[":
        return [f"{group}={clip(value)}: for several at once type {group}=[{value}]; for a run of each, -m"], []
    chosen = [name.strip().strip("'\"") for name in value.strip("[]").split(",") if name.strip()]
    if not many and not (chosen and chosen[0]):
        return [f"{group}={clip(value)}: no choice given; {there}"], []
    wrong = [
        f"{group}={clip(name)}: no such choice{nearest(name, names)} ({there})" for name in chosen if name not in names
    ]
    if wrong:
        return wrong, []
    if many:
        return [], [f"{group}=[{','.join(dict.fromkeys(chosen))}]"]
    return [], [f"{'' if group in known else '+'}{group}={chosen[0]}"]


def _quoted(value: str) -> str:
    """Text that Hydra's grammar has no characters for, such as `/data/Müller`, in quotes; the rest as it is."""
    if _STRUCTURE.search(value) or not _unreadable(f"key={value}"):
        return value
    return f'"{value}"'


def _unreadable(text: str) -> str:
    """Why Hydra's grammar cannot read an override; empty where it can."""
    if _PLAIN.match(text):
        return ""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        one = OverridesParser.create().parse_override(text)
    except AttributeError:  # what its parser does with {} where asserts are off: it moves on within them
        return "Hydra reads no {...} under python -O; set the keys one by one"
    except HydraException:
        return (
            "brackets, quotes or other special characters do not match; put text in double quotes, and all of it in "
            "single quotes for the shell: 'key=\"any text\"'"
        )
    if one.is_sweep_override():
        return "several values; key=[a,b] is a list, and -m makes a run for each"
    return ""


_PLAIN = re.compile(r"^[+~\w.]+=?[A-Za-z0-9_./:+@%-]*$", re.ASCII)
"""Overrides that need no grammar to be read."""


def clip(text: object, width: int = 100) -> str:
    """For a message: one line of what can be printed, and not without end."""
    line = "".join(each if each.isprintable() else " " for each in str(text)[: width + 1])
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _in_words(error: Exception) -> str:
    """What Hydra and OmegaConf say, with the key in front, without their own affairs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    said = [line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type", "See https"))]
    text = " ".join(said[:3]) or type(error).__name__
    text = re.sub(r'^\w+ raised while resolving interpolation: "?(.*?)"?$', r"\1", text)
    return clip(f"{key}: {text}" if key and not text.startswith(key) else text, 400)
