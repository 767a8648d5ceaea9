"""A model folder with a tokenizer that can be trained with: fast, and with a padding token. No torch as a rule.

A folder that needs a change is not edited: an overlay in the cache has links to its files, and the changed ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dtrain.errors import ModelError
from dtrain.folders import whole_folder
from dtrain.models._hub import read_json

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SPARE = re.compile(r"pad|reserved|unused|control_|extra_id", re.IGNORECASE)
"""Tokens that no text contains, by their names."""


def with_tokenizer(folder: Path, pad_token: str | None, cache: Path) -> Path:
    """`folder`, or an overlay of it whose tokenizer has a padding token. Raises ModelError."""
    config = _read(folder / "tokenizer_config.json")
    converts = not (folder / "tokenizer.json").is_file() or not config.get("eos_token")
    present = _content(config.get("pad_token"))
    if not converts and present and pad_token in (None, present):
        return folder
    target = cache / f"hf-{_digest(folder, pad_token)}"
    if target.is_dir():
        return target
    with whole_folder(target) as making:
        if converts:
            _convert(folder, making)
        _set_pad(folder, making, pad_token)
        for path in sorted(folder.iterdir()):
            if not (making / path.name).exists() and path.is_file():
                (making / path.name).symlink_to(path.resolve())
    return target


def _set_pad(folder: Path, making: Path, pad_token: str | None) -> None:
    """Write the tokenizer's config with a padding token."""
    source = making if (making / "tokenizer_config.json").is_file() else folder
    config = _read(source / "tokenizer_config.json")
    vocab, added = _tokens(source / "tokenizer.json")
    pad = pad_token or _content(config.get("pad_token"))
    eos = _content(config.get("eos_token"))
    if pad is None:
        raise ModelError(f"model.pad_token is needed: the tokenizer in {folder} has none; {_suggest(added, eos)}")
    if pad not in vocab:
        raise ModelError(f"model.pad_token={pad!r} is not a token of {folder}; {_suggest(added, eos)}")
    (making / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}, indent=2) + "\n")


def _suggest(added: list[str], eos: str | None) -> str:
    spare = [token for token in added if _SPARE.search(token)]
    spare.sort(key=lambda token: "pad" not in token.lower())
    if spare:
        return f"one that no text has: model.pad_token='{spare[0]}'"
    if "<unk>" in added:
        return "one that hardly any text has: model.pad_token='<unk>'"
    return (f"it has no spare token; model.pad_token='{eos}' is the token that ends a text, which works here since "
            f"padding is never learned, but other tools may then never learn to stop")  # fmt: skip


def _tokens(path: Path) -> tuple[set[str], list[str]]:
    """Every token, and those that were added by name."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing narrower
        raise ModelError(f"model.path: {path} cannot be read ({e}); fetch it again") from e
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    return set(tokenizer.get_vocab(with_added_tokens=True)), added


def _convert(folder: Path, making: Path) -> None:
    """Write the files of a fast tokenizer, with the special tokens that its class implies."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make one up, of no tokens
        raise ModelError(f"model.path: {folder} has no tokenizer ({', '.join(_VOCABULARIES)}); copy the one that the "
                         f"model was made with into the folder")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.save_pretrained(making)
    except Exception as e:  # as many kinds as there are tokenizers
        raise ModelError(f"model.path: the tokenizer in {folder} cannot be read ({type(e).__name__}: {e}); it needs "
                         f"tokenizer.json and tokenizer_config.json") from e  # fmt: skip
    if not (making / "tokenizer.json").is_file():
        raise ModelError(f"model.path: {folder} has no tokenizer.json, and its tokenizer ({type(tokenizer).__name__}) "
                         f"has no fast form; choose a model that has one")  # fmt: skip


def _digest(folder: Path, pad_token: str | None) -> str:
    digest = hashlib.sha256(f"1\0{folder.resolve()}\0{pad_token}".encode())
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
