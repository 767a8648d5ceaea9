"""The small files of a model's folder: what loading it needs besides weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""In an adapter's folder, as peft calls them."""
ADAPTER_BASE = "base.json"
"""Beside them in an adapter that dtrain has written: the model that it goes with."""
_READ_BYTES = 1 << 22
_KEPT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def copy_assets(assets: Path, folder: Path, *, but: Collection[str] = ()) -> None:
    """Copy config, tokenizer, template and code, none of the weights, into `folder`, which is made if need be.

    `but`: files that are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(assets.iterdir()):
        if (
            file.name not in but
            and file.is_file()
            and file.suffix in _KEPT
            and not file.name.endswith(".safetensors.index.json")
        ):
            shutil.copyfile(file, folder / file.name)


def weights_digest(folder: Path, cache: Path, say: Callable[[str], None]) -> str:
    """Of the content of all safetensors files of a model's folder, in the order of their names. What was found is kept
    in `cache`, by the sizes and times of the files.
    """
    import xxhash

    from dtrain.runs.files import read_json, write_json

    files = sorted(folder.glob("*.safetensors"))
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    key = xxhash.xxh3_64_hexdigest(json.dumps([str(folder.resolve()), stats]).encode())
    kept = cache / f"weights-{key}.json"
    if (found := read_json(kept)) is not None:
        return str(found["xxh3"])
    say(f"model: reading {sum(size for _, size, _ in stats) / 1e9:,.2f} GB of weights for their digest, by which "
        f"checkpoints name what is not trained")  # fmt: skip
    digest = files_digest(folder)
    write_json(kept, {"folder": str(folder), "xxh3": digest})
    return digest


def files_digest(folder: Path) -> str:
    """The same, read anew."""
    import xxhash

    state = xxhash.xxh3_128()
    for file in sorted(folder.glob("*.safetensors")):
        state.update(file.name.encode())
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_READ_BYTES):
                state.update(chunk)
    return state.hexdigest()
