"""Keep tokens and passwords out of what is written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_ENV_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8
"""A shorter value of such a variable is more likely a word that stands elsewhere too."""
_KNOWN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
                    r"|wandb_v1_[A-Za-z0-9_-]{20,})")  # fmt: skip
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "credential", "credentials", "apikey"}
_TEXT_TOKENS = {
    "bos",
    "eos",
    "pad",
    "unk",
    "mask",
    "sep",
    "cls",
    "end",
    "stop",
    "start",
    "image",
    "special",
    "chat",
    "per",
}
_SECRET_KEYS = {"api", "access", "secret", "private", "auth", "ssh", "account", "wandb", "hf", "encryption"}
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")


def is_secret(key: str) -> bool:
    """Whether a key names a secret: `hub_token`, `api_key`, `password`; not `eos_token`, `num_tokens`, `text_key`."""
    words = [word.lower() for word in _WORD.findall(key.rsplit(".", 1)[-1])]
    if _SECRET_WORDS & set(words):
        return True
    last, before = (words[-1:] or [""])[0], (words[-2:-1] or [""])[0]
    return (last == "token" and before not in _TEXT_TOKENS) or (last == "key" and before in _SECRET_KEYS)


def is_secret_variable(name: str) -> bool:
    """The same of a variable of the environment."""
    return _ENV_NAME.search(name) is not None


def scrub(value: Any, env: Mapping[str, str] = os.environ) -> Any:
    """`value` with every secret of the environment, and what looks like a token, replaced in its strings."""
    secrets = sorted({text for name, text in env.items() if _ENV_NAME.search(name) and len(text) >= _SHORTEST},
                     key=len, reverse=True)  # fmt: skip
    return _scrub(value, secrets)


def _scrub(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return _IN_URL.sub(HIDDEN, _KNOWN.sub(HIDDEN, value))
    if isinstance(value, Mapping):
        return {key: _scrub(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrub(item, secrets) for item in value]
    return value


def redact(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """A command line that can be written down: `hub_token=***`, `--password ***`."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        key, equals, value = word.partition("=")
        if hide_next and not word.startswith("--"):
            shown.append(HIDDEN)
            hide_next = False
            continue
        secret = is_secret(key.lstrip("+~-"))
        hide_next = secret and not equals and word.startswith("--")
        shown.append(f"{key}={HIDDEN}" if secret and equals and value else word)
    return list(scrub(shown, env))


def redact_config(config: Any, env: Mapping[str, str] = os.environ) -> Any:
    """Plain data with the values of secret keys hidden, at any depth."""
    if isinstance(config, Mapping):
        return {key: HIDDEN if is_secret(str(key)) and isinstance(item, str) and item else redact_config(item, env)
                for key, item in config.items()}  # fmt: skip
    if isinstance(config, (list, tuple)):
        return [redact_config(item, env) for item in config]
    return scrub(config, env)
