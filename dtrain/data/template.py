"""A model's folder with the chat template that is trained with, so that it is the one that is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtrain.config.compose import choices, group_choice
from dtrain.config.spec import TemplateSpec
from dtrain.data.tokenizer import TextTokenizer, read_config, stop_ids
from dtrain.errors import DataError
from dtrain.folders import whole_folder

_FORMAT = 1
"""Of the folders that `with_template` makes; a change makes older ones unused."""
_KEY = "chat_template"
_SAME = "nothing-to-change"
"""In place of all files, where the model's folder is right as it is: to find out takes a while."""


def with_template(folder: Path, template: TemplateSpec, cache: Path) -> Path:
    """A folder with the files of `folder`, this template and a `generation_config.json` that stops at the ends of its
    turns: `folder` itself where that is so already, else one in the cache with links.

    Raises DataError where the tokenizer lacks a token that is to end turns.
    """
    if not template.text and not has_template(folder):
        if template.ends:
            raise DataError("template.ends: the tokenizer has no chat template, so no turns end; leave it out")
        return folder
    target = cache / f"template-{_digest(folder, template)}"
    if not target.is_dir():
        with whole_folder(target) as making:
            _fill(making, folder, template)
    return folder if (target / _SAME).is_file() else target


def has_template(folder: Path) -> bool:
    """Whether the tokenizer in a model's folder has one."""
    return (folder / "chat_template.jinja").is_file() or bool(read_config(folder / "tokenizer_config.json").get(_KEY))


def describe(folder: Path, assets: Path, template: TemplateSpec, tokenizer: TextTokenizer, *, used: bool) -> list[str]:
    """What a user should know of the template in `assets`, made of `folder`; `used`: whether the rows are rendered."""
    lines = []
    if template.text:
        lines.append(template.name + (", in place of the tokenizer's own" if has_template(folder) else ""))
    elif used:
        lines.append("the tokenizer's own")
    if used:
        lines += tokenizer.chat_notes()
    elif template.text:
        lines.append("not used here, as the rows are no conversations")
    more = [tokenizer.decode([each]) for each in stop_ids(assets) if each not in _stops(folder)]
    if folder != assets and more:
        lines.append(f"generation of the exported model stops at {', '.join(more)} too")
    return [f"template: {line}" for line in lines]


def fitting(tokenizer: TextTokenizer) -> str:
    """What to type for a template of dtrain whose ends of turns this tokenizer has as tokens."""
    values = {name: group_choice("template", name) for name in choices()["template"]}
    names = [name for name, one in values.items() if one.get("text")
             and all(tokenizer.token_id(token) is not None for token in one.get("ends", ()))]  # fmt: skip
    return f"type {' or '.join(f'template={name}' for name in names)}" if names else "none of dtrain's suits its tokens"


def _fill(making: Path, folder: Path, template: TemplateSpec) -> None:
    if template.text:
        from dtrain.data.chat import ChatTemplate

        ChatTemplate(template.text, {}, origin=template.name)  # does it parse?
        config = {key: value for key, value in read_config(folder / "tokenizer_config.json").items() if key != _KEY}
        _write(making / "tokenizer_config.json", config)
        (making / "chat_template.jinja").write_text(template.text, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        if path.is_file() and not (making / path.name).exists():
            (making / path.name).symlink_to(path.resolve())
    tokenizer = TextTokenizer.load(making if template.text else folder)
    generation = read_config(folder / "generation_config.json")
    ids = _stops(folder)
    stops = [_stop_id(tokenizer, template, token) for token in template.ends or tokenizer.ends_of_turns()]
    if not set(stops) <= set(ids):
        (making / "generation_config.json").unlink(missing_ok=True)
        _write(making / "generation_config.json", {**generation, "eos_token_id": list(dict.fromkeys([*ids, *stops]))})
    elif not template.text:
        for path in making.iterdir():
            path.unlink()
        (making / _SAME).touch()


def _stop_id(tokenizer: TextTokenizer, template: TemplateSpec, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise DataError(f"template={template.name}: ends a turn with {token}, which is no token of this model, so "
                        f"generation could not stop there; {fitting(tokenizer)}; or choose a model that has the "
                        f"token")  # fmt: skip
    return found


def _stops(folder: Path) -> list[int]:
    """Where generation of the model stops as it is."""
    found = stop_ids(folder) or read_config(folder / "config.json").get("eos_token_id")
    return [found] if isinstance(found, int) else found or []


def _digest(folder: Path, template: TemplateSpec) -> str:
    import xxhash

    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    said = [_FORMAT, str(folder.resolve()), files, template.text, template.ends]
    return xxhash.xxh3_128_hexdigest(json.dumps(said).encode())[:16]


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
