"""From `model.path` to a folder on this machine: a local one as it is, a repository by download. No torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.errors import ModelError

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_OTHER = ["*/*", "consolidated*"]
"""Never fetched: further copies of the weights in other formats, as a rule."""


def local_config(path: str, revision: str | None, *, folders_only: bool = False) -> dict[str, Any]:
    """The config.json of a folder, or of a repository that is in the hub's cache; empty where there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_config(folder)
    if folders_only or not is_repository(path):
        return {}
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return read_config(Path(found).parent) if isinstance(found, str) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ModelError."""
    try:
        return read_json(folder / "config.json")
    except FileNotFoundError as e:
        raise ModelError(f"model.path: {folder} has no config.json, so it is not a model folder; give the folder that "
                         f"has it") from e  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """One of the JSON files of a model's folder. Raises ModelError, and FileNotFoundError where it is not there."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as e:
        raise ModelError(f"model.path: {path} is not JSON ({e}); fetch it again") from e
    assert isinstance(config, dict), path
    return config


def fetch(path: str, revision: str | None, hub: str, *, weights: bool, code: bool) -> Path:
    """The folder of this model, complete; with safetensors where `weights`, with Python files where `code`.

    What is here already is not asked for again. Raises ModelError.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        read_config(folder)
        if weights and (problem := _weights_problem(folder)):
            raise ModelError(f"model.path={path!r}: {problem}")
        return folder.absolute()
    if not is_repository(path):
        raise ModelError(missing(path))
    patterns = [*_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    download = _from_modelscope if hub == "modelscope" else _from_huggingface
    found = download(path, revision, patterns, lambda at: _is_complete(at, weights=weights))
    read_config(found)
    if weights and (problem := _weights_problem(found)):
        raise ModelError(f"model.path={path!r} ({found}): {problem}")
    return found


def _is_complete(folder: Path, *, weights: bool) -> bool:
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return (folder / "config.json").is_file() and has_tokenizer and not (weights and _weights_problem(folder))


def _weights_problem(folder: Path) -> str:
    """What keeps the weights of this folder from being read, with the way out; empty where nothing does."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        absent = sorted(name for name in names if not (folder / name).is_file())
        return (
            f"{len(absent)} of {len(names)} weight files are missing, {absent[0]} first; fetch them" if absent else ""
        )
    if (folder / "model.safetensors").is_file():
        return ""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return ("only pickled weights (.bin), which can run code when read, so dtrain never does; convert them where "
                "you trust them: transformers' AutoModelForCausalLM.from_pretrained(path).save_pretrained(folder), "
                "then model.path=<folder>")  # fmt: skip
    return ("no weights as safetensors (model.safetensors, or its index); fetch or convert them, or set "
            "model.from_scratch=true for fresh ones")  # fmt: skip


def is_repository(path: str) -> bool:
    """Whether it may be the name of one, rather than a path."""
    return _REPOSITORY.match(path) is not None


def missing(path: str) -> str:
    """What to say of a folder that is not there."""
    near = _near(Path(path).expanduser())
    hint = f"did you mean {near}? Otherwise " if near else ""
    return f"model.path={path!r}: no such folder; {hint}give a folder with config.json, or a repository as owner/name"


def _near(folder: Path) -> str:
    """A sibling with a similar name, else what the parent has."""
    if not folder.parent.is_dir():
        return ""
    names = sorted(each.name for each in folder.parent.iterdir() if each.is_dir() and not each.name.startswith("."))
    close = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.5)
    return " or ".join(str(folder.parent / name) for name in close)


def _from_huggingface(
    name: str, revision: str | None, patterns: list[str], is_complete: Callable[[Path], bool]
) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    def get(*, local: bool) -> Path:
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER, local_files_only=local
        )
        return Path(found)

    try:
        cached = get(local=True)
        if is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    at = f"model.path={name!r}" + (f" at revision {revision!r}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{at}: not a folder here, and not complete in the hub's cache ({constants.HF_HUB_CACHE}), "
                         f"while HF_HUB_OFFLINE=1; {_elsewhere(name)}")  # fmt: skip
    try:
        return get(local=False)
    except GatedRepoError as e:
        raise ModelError(
            f"{at}: access is gated; accept the licence on its page and log in with `hf auth login`"
        ) from e
    except RepositoryNotFoundError as e:
        near = _near(Path(name))
        raise ModelError(f"{at}: not a folder here{f' (did you mean {near}?)' if near else ''}, and the hub shows no "
                         f"such repository; check the name, or `hf auth login` if it is private") from e  # fmt: skip
    except Exception as e:  # the hub passes on whatever its HTTP library raises
        raise ModelError(f"{at}: not a folder here, not complete in the hub's cache ({constants.HF_HUB_CACHE}), and "
                         f"the download failed ({type(e).__name__}); {_elsewhere(name)}") from e  # fmt: skip


def _from_modelscope(name: str, revision: str | None, patterns: list[str], is_complete: Callable[[Path], bool]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as e:
        raise ModelError("model.hub=modelscope: the package is not installed; pip install 'dtrain[modelscope]', or "
                         "model.hub=huggingface") from e  # fmt: skip

    def get(*, local: bool) -> Path:
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER, local_files_only=local
        )
        return Path(found)

    try:
        cached = get(local=True)
        if is_complete(cached):
            return cached
    except Exception:  # noqa: BLE001 - nothing cached; its error class is not public
        pass
    try:
        return get(local=False)
    except Exception as e:
        raise ModelError(f"model.path={name!r}: modelscope does not give it ({type(e).__name__}: {e}); check the name, "
                         f"or fetch it on a machine with a network and give its folder") from e  # fmt: skip


def _elsewhere(name: str) -> str:
    target = name.rpartition("/")[2]
    return (f"on a machine with a network: `hf download {name} --local-dir {target}`, copy the folder here, and set "
            f"model.path to it")  # fmt: skip
