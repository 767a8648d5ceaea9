"""Which model a name on the command line means: a run's, a folder's, or an adapter with the model that it is for."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtrain.errors import ExportError, ModelError, RunError
from dtrain.models.assets import ADAPTER_BASE, ADAPTER_CONFIG
from dtrain.runs import RunDir
from dtrain.runs.files import read_json

if TYPE_CHECKING:
    from dtrain.engine.loaded import Loaded


def say(line: str) -> None:
    """Beside what is asked for, which is all that stdout gets."""
    print(line, file=sys.stderr, flush=True)


class Named(NamedTuple):
    folder: Path
    """With the tokenizer; and with config and weights, or an adapter's."""
    base: Path | None
    """The model that the adapter goes with; None for a whole model."""
    run: RunDir | None
    """Where a run was named."""

    def load(self, dtype: str, *, writes: bool) -> Loaded:
        """`writes`: it is to give text. Raises ModelError, DataError."""
        from dtrain.engine.loaded import load

        return load(self.folder, self.base, dtype=dtype, writes=writes)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a run's folder or its name in runs/; a model's folder; or an "
                                                 "adapter's")  # fmt: skip
    parser.add_argument("--base", type=Path, metavar="DIR", help="of an adapter: where the model is that it goes with "
                                                                 "(as its base.json says)")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help="of the weights while they are used (bf16 on CUDA, fp32 on CPU)")  # fmt: skip


def find(args: argparse.Namespace) -> Named:
    """Raises ModelError, ExportError."""
    folder, run = folder_of(args.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        if args.base is not None:
            raise ModelError(f"--base {args.base}: is for adapters, and {folder} is a whole model; leave it out")
        return Named(folder, None, run)
    return Named(folder, _base(folder, args.base, run), run)


def folder_of(name: Path) -> tuple[Path, RunDir | None]:
    """With a model or an adapter; and the run, where one was named. Raises ModelError."""
    from dtrain.verbs import runs

    if (name / "config.json").is_file() or (name / ADAPTER_CONFIG).is_file():
        return name, None
    if (name / "manifest.json").is_file() and not (name / "config.yaml").is_file():
        raise ModelError(f"{name}: a checkpoint, which holds no model's files; `dtrain export {name}` makes a folder "
                         f"that can be used")  # fmt: skip
    try:
        run = runs.find(name)
    except RunError as error:
        raise ModelError(f"{name}: neither a run nor a folder with config.json or {ADAPTER_CONFIG}") from error
    if not run.export.is_dir():
        raise ModelError(f"{run.export}: not there; the run has not exported its weights, see `dtrain runs show "
                         f"{name}`; `dtrain export {name}` exports its newest checkpoint")  # fmt: skip
    return run.export, run


def _base(adapter: Path, typed: Path | None, run: RunDir | None) -> Path:
    """The folder of the model that this adapter was trained on. Raises ModelError, ExportError."""
    said = read_json(adapter / ADAPTER_BASE) or _of_peft(adapter)
    folder = typed if typed is not None else _named(adapter, said)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(f"{'--base ' if typed else ''}{folder}: the model that {adapter} was trained on is to be "
                         f"there, and it has no config.json with safetensors; say with --base where it is")  # fmt: skip
    if said.get("xxh3") is None:
        say(f"{adapter}: does not say by a digest which model it was trained on; {folder} is taken for it")
        return folder
    from dtrain.checkpoint.tuned import check_base
    from dtrain.models.assets import weights_digest

    data = run.read_manifest().get("data") if run is not None else None
    with tempfile.TemporaryDirectory(prefix="dtrain-digest-") as nowhere:
        kept = Path(data["dir"]).parent if isinstance(data, dict) else Path(nowhere)
        digest = weights_digest(folder, kept if kept.is_dir() else Path(nowhere), say)
    try:
        check_base(said, digest, folder)
    except ExportError as error:
        raise ModelError(str(error)) from None
    return folder


def _of_peft(adapter: Path) -> dict[str, Any]:
    """What an adapter that was made elsewhere says of its model."""
    config = read_json(adapter / ADAPTER_CONFIG) or {}
    return {"path": config.get("base_model_name_or_path"), "revision": config.get("revision")}


def _named(adapter: Path, said: Mapping[str, Any]) -> Path:
    """The folder of the model that it names, fetched if need be. Raises ModelError."""
    from dtrain.models._hub import fetch

    path = said.get("path")
    if not path:
        raise ModelError(f"{adapter}: names no model that it goes with, as where that one was made from a seed and "
                         f"never stored; `dtrain export RUN --merge --to DIR` makes a whole model, or say with --base "
                         f"where it is")  # fmt: skip
    try:
        return fetch(path, said.get("revision"), "huggingface", weights=True, code=False)
    except ModelError as error:
        raise ModelError(f"{adapter}: was trained on {path}, which cannot be had: {error}; say with --base where it "
                         f"is") from error  # fmt: skip
