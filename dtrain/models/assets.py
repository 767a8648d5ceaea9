"""The small files of a model's folder: what loading it needs besides weights."""

from __future__ import annotations

import shutil
from pathlib import Path

_KEPT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def copy_assets(assets: Path, folder: Path) -> None:
    """Copy config, tokenizer, template and code, none of the weights, into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(assets.iterdir()):
        if file.is_file() and file.suffix in _KEPT and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
