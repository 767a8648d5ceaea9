"""Write a run's weights to a folder that transformers loads: of a checkpoint, or of its own export."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dtrain.config.spec import ModelSpec, TuningSpec
from dtrain.config.validate import not_allowed, validate_spec
from dtrain.errors import ExportError
from dtrain.folders import remove_leftovers
from dtrain.verbs._checkpoints import STEP_HELP, chosen, named

if TYPE_CHECKING:
    from dtrain.checkpoint.manifest import Manifest
    from dtrain.checkpoint.tuned import Parts
    from dtrain.models.base import ModelBundle
    from dtrain.runs import RunDir

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder, or its name in runs/; or the folder of a checkpoint or "
                                               "an export")  # fmt: skip
    parser.add_argument("--step", metavar="N", help=f"the checkpoint {STEP_HELP} (the newest that is whole; of a run "
                                                    f"without any, its own export)")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to make; it must not be there (in exports/ of "
                                                               "the run, by step and precision)")  # fmt: skip
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (as the run exports them)")
    parser.add_argument("--merge", action="store_true", help="work an adapter into the model that it was trained on")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where that model is now (as the run says)")
    parser.add_argument("--plugin", action="append", default=[], metavar="PACKAGE",
                        help="a package that choices of the run come from")  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file, as 500MB or 5GB (5GB)")


def run(args: argparse.Namespace) -> int:
    max_shard_bytes = _bytes(args.max_shard_size)
    if args.to is not None and args.to.exists():
        raise ExportError(f"--to {args.to}: is there already; name a new folder")
    source = _of_folder(args.run) if _is_export(args.run) else _of_run(args)
    from dtrain.checkpoint.export import write_export
    from dtrain.checkpoint.safetensors import FORMATS

    dtype = args.dtype or source.dtype()
    if dtype not in FORMATS:
        raise ExportError(f"{source.folder}: says dtype={dtype}, which is none of {', '.join(FORMATS)}; name one with "
                          f"--dtype")  # fmt: skip
    to = args.to or source.exports / f"{source.title}-{dtype}"
    if to.exists():
        raise ExportError(f"{to}: is there already; name another folder with --to")
    print(f"exporting {source.folder} in {dtype}", flush=True)
    (shapes, tensors), adapter = source.read()
    remove_leftovers(to.parent)
    try:
        write_export(tensors, shapes, to, assets=source.assets, dtype=dtype, max_shard_bytes=max_shard_bytes,
                     adapter=adapter)  # fmt: skip
    except OSError as error:
        raise ExportError(f"{to}: cannot be written ({error.strerror or error}); nothing is left of it; name "
                          f"another folder with --to") from None  # fmt: skip
    if source.check is not None:
        print(source.check(to), flush=True)
    print(f"exported to {to}")
    return 0


class _Source(NamedTuple):
    """Where the weights come from."""

    folder: Path
    assets: Path
    """With config and tokenizer."""
    exports: Path
    """Where its exports go."""
    title: str
    dtype: Callable[[], str]
    read: Callable[[], Parts]
    check: Callable[[Path], str] | None = None
    """Compares what was written with what it was made of, in a line."""


def _is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _of_folder(folder: Path) -> _Source:
    from dtrain.checkpoint.export import dtype_of, read_export
    from dtrain.checkpoint.tuned import Parts

    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    return _Source(folder, folder, folder.parent / "exports", folder.name, lambda: dtype_of(folder),
                   lambda: Parts(read_export(folder), None))  # fmt: skip


def _of_run(args: argparse.Namespace) -> _Source:
    """Of a checkpoint whose every byte is what was written. Raises CheckpointError, ExportError, RunError."""
    from dtrain.checkpoint import manifest, verify

    # Of kernels that nothing here asks for; peft imports it for every adapter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found = named(args.run)
    if not found.folders and args.step is None:
        if not _is_export(found.run.export):
            raise ExportError(f"{found.run.path}: has neither a checkpoint nor an export of its own yet; see `dtrain "
                              f"runs show {args.run}`")  # fmt: skip
        return _of_folder(found.run.export)
    folder = chosen(args.run, args.step, verify.problems, print)
    assets = found.run.model
    if not (assets / "config.json").is_file():
        raise ExportError(f"{assets}: not there, and a checkpoint lacks the model's config and tokenizer, which are in "
                          f"that folder of its run; export it from there")  # fmt: skip
    read = manifest.read(folder)
    from dtrain.checkpoint.export import read_checkpoint
    from dtrain.checkpoint.tuned import Parts, read_tuned

    how = read.config.get("export")
    said = str(how.get("dtype", "fp32")) if isinstance(how, dict) else "fp32"
    title = f"{folder.name}-merged" if args.merge else folder.name
    if read.base is None:
        if args.merge:
            raise ExportError(f"--merge: {folder} is of a whole model, there is nothing to merge; leave it out")
        return _Source(folder, assets, found.run.exports, title, lambda: said,
                       lambda: Parts(read_checkpoint(folder, read), None))  # fmt: skip
    if args.merge and not read.base.get("adapter"):
        raise ExportError(f"--merge: {folder} has no adapter: its export is the whole model as it is; leave it out")
    bundle = _tuned(found.run, read, args)

    def check(merged: Path) -> str:
        from dtrain.engine.merged import compare

        return compare(bundle.assets, read_tuned(folder, read, bundle, merge=False), merged)

    def parts() -> Parts:
        return read_tuned(folder, read, bundle, merge=args.merge)

    return _Source(folder, assets, found.run.exports, title, lambda: said, parts, check if args.merge else None)


def _tuned(run: RunDir, read: Manifest, args: argparse.Namespace) -> ModelBundle:
    """The model of the run with its tuning, on meta, and the weights that it was tuned from. Raises ExportError where
    they are others.
    """
    from dtrain.checkpoint.tuned import check_base
    from dtrain.models.assets import weights_digest
    from dtrain.verbs._eval_rows import settled

    # Not all of it: the files of the data may be gone, or named from another folder.
    config = settled(run)
    model, tuning = (validate_spec(group, config[group], plugins=args.plugin) for group in ("model", "tuning"))
    assert isinstance(model, ModelSpec)
    assert isinstance(tuning, TuningSpec)
    if problems := [line for one in (model, tuning) for line in not_allowed(one, args.plugin, "--plugin {}")]:
        raise ExportError.of(problems)
    data = run.read_manifest().get("data")
    assets = args.base or (Path(data["assets"]) if isinstance(data, dict) else None)
    assert read.base is not None
    if assets is None or not (assets / "config.json").is_file():
        raise ExportError(f"{assets}: not there any more: the model that was tuned, {read.base.get('path')}; say with "
                          f"--base where it is")  # fmt: skip
    cache = Path(data["dir"]).parent if isinstance(data, dict) else run.path
    digest = weights_digest(assets, cache, print) if read.base.get("xxh3") else None
    check_base(read.base, digest, assets)
    seed = config["run"]["seed"]
    return tuning.apply(model.build(assets, seed=seed), seed=seed)


def _bytes(text: str) -> float:
    """Of a size as people write it. Raises ExportError."""
    match = _SIZE.fullmatch(text.strip().upper())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if not size:
        raise ExportError(f"--max-shard-size {text}: no size; write it as 500MB or 5GB")
    return size
