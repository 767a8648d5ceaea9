"""A model's folder whose configuration asks for outputs of its own in place of the vocabulary. No torch here.

Such a model is what transformers calls one for sequence classification: a decoder, and `score`, a linear layer that is
read at a text's last token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import ModelError
from dtrain.folders import whole_folder

_KIND, _LANGUAGE = "ForSequenceClassification", "ForCausalLM"


def has_outputs(folder: Path) -> bool:
    """Whether `config.json` is of such a model."""
    return any(str(name).endswith(_KIND) for name in _config(folder).get("architectures") or ())


def with_outputs(folder: Path, names: Sequence[str], pad_id: int, cache: Path) -> Path:
    """`folder` where there are no `names` of outputs, else one in the cache with links to its files, and a
    configuration that has these. Raises ModelError where the model is of the other kind.
    """
    config = _config(folder)
    if not names:
        if has_outputs(folder):
            raise ModelError(f"model.path: the model in {folder} has outputs of its own in place of a vocabulary "
                             f"({config['architectures'][0]}); use objective=classifier or reward, or a language "
                             f"model")  # fmt: skip
        return folder
    architecture = str((config.get("architectures") or [""])[0])
    if not architecture.endswith((_KIND, _LANGUAGE)):
        raise ModelError(f"model.path: {folder}/config.json names no language model in `architectures` "
                         f"({architecture or 'nothing'}), so it is not known what it is with outputs of its "
                         f"own")  # fmt: skip
    labels = dict(enumerate(names))
    config |= {
        "architectures": [architecture.removesuffix(_LANGUAGE).removesuffix(_KIND) + _KIND],
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in labels.items()},
        "label2id": {name: i for i, name in labels.items()},
        "pad_token_id": pad_id if config.get("pad_token_id") is None else config["pad_token_id"],
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    target = cache / f"outputs-{hashlib.sha256(f'{folder.resolve()}{text}'.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        with whole_folder(target) as making:
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.name != "config.json":
                    (making / path.name).symlink_to(path.resolve())
            (making / "config.json").write_text(text, encoding="utf-8")
    return target


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found
