"""The model that training started from, which some losses compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dtrain.config.spec import ModelSpec
from dtrain.config.validate import not_allowed, validate_spec
from dtrain.errors import ModelError
from dtrain.models.assets import ADAPTER_BASE, ADAPTER_CONFIG
from dtrain.runs.files import read_json
from dtrain.verbs._eval_rows import settled
from dtrain.verbs._model import Named, folder_of, say

if TYPE_CHECKING:
    from torch import nn

    from dtrain.engine.loaded import Loaded
    from dtrain.runs import RunDir


def start(named: Named, typed: Path | None, loaded: Loaded, plugins: Sequence[str]) -> nn.Module:
    """What was `typed`; else what an adapter is for, or what the run says. Raises ModelError."""
    if typed is not None:
        folder, _ = folder_of(typed)
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(f"--reference {typed}: an adapter; `dtrain export {typed} --merge --to DIR` makes a whole "
                             f"model of it")  # fmt: skip
        return _stored(folder, loaded)
    if named.base is not None:
        return _of_adapter(named, named.base, loaded)
    if named.run is None:
        raise ModelError(f"{named.folder}: the loss compares with the model that training started from, which it does "
                         f"not name; say by --reference DIR where that is, or type objective=sft for the loss of the "
                         f"replies")  # fmt: skip
    return _of_run(named.run, loaded, plugins)


def _stored(folder: Path, loaded: Loaded) -> nn.Module:
    from dtrain.engine.loaded import load

    say(f"reference: {folder}")
    return load(folder, None, dtype=loaded.dtype, writes=False).scored()


def _of_adapter(named: Named, base: Path, loaded: Loaded) -> nn.Module:
    """The model that it is for; with the adapter that it started from, where its losses compared with that."""
    from dtrain.checkpoint.tuned import compared_with
    from dtrain.engine.loaded import load
    from dtrain.models.assets import files_digest

    start = (read_json(named.folder / ADAPTER_BASE) or {}).get("start")
    if start is None and named.run is not None and (first := compared_with(settled(named.run))):
        start = {"path": first}  # its export is older than that word
    if start is None:
        return _stored(base, loaded)
    folder = Path(start["path"])
    there = (folder / ADAPTER_CONFIG).is_file()
    if not there or (start.get("xxh3") is not None and files_digest(folder) != start["xxh3"]):
        gone = "holds other weights now" if there else "is not there any more"
        raise ModelError(f"{named.folder}: its losses compared with the adapter that it started from, and {folder} "
                         f"{gone}; bring it back, or make one model of it and its base by `dtrain export --merge`, and "
                         f"say by --reference DIR where that is")  # fmt: skip
    say(f"reference: {base} with the adapter {folder}, which training started from")
    return load(folder, base, dtype=loaded.dtype, writes=False).scored()


def _of_run(run: RunDir, loaded: Loaded, plugins: Sequence[str]) -> nn.Module:
    """Made as the run made it: from files, or from its seed."""
    from dtrain.engine.loaded import whole
    from dtrain.models.base import DTYPES

    config, data = settled(run), run.read_manifest().get("data")
    assets = Path(data["assets"]) if isinstance(data, dict) else None
    if assets is None or not (assets / "config.json").is_file():
        raise ModelError(f"{run.path}: the model that training started from is not at {assets} any more; say by "
                         f"--reference DIR where it is")  # fmt: skip
    entry: dict[str, Any] = dict(config["model"])
    if entry.get("trust_remote_code"):  # nothing that is measured runs code of its own
        entry["trust_remote_code"] = False
    model = cast(ModelSpec, validate_spec("model", entry, plugins=plugins))
    if problems := not_allowed(model, plugins, "--plugin {}"):
        raise ModelError.of(problems)
    made = f"from run.seed={config['run']['seed']}, " if not model.trained() else ""
    say(f"reference: the weights that the run started from, {made}{assets}")
    return whole(model.build(assets, seed=config["run"]["seed"]), loaded.device, DTYPES[loaded.dtype])
