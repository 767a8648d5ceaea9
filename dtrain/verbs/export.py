"""Write a run's weights to a folder that transformers loads, in another precision or shard size."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.errors import ExportError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder, or its name in runs/")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make; it must not be there")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default=None, help="of the weights (as they are)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file, 10^9 bytes (5)")


def run(args: argparse.Namespace) -> int:
    from dtrain.verbs.runs import find

    source = find(args.run).export
    if not source.is_dir():
        raise ExportError(
            f"{source}: not there; a run exports its weights when it ends, see `dtrain runs show {args.run}`"
        )
    if args.to.exists():
        raise ExportError(f"--to {args.to}: is there already; name a new folder")
    if args.max_shard_gb <= 0:
        raise ExportError(f"--max-shard-gb {args.max_shard_gb:g}: must be more than 0")
    from dtrain.checkpoint.export import dtype_of, read_tensors, write_export

    shapes, tensors = read_tensors(source)
    write_export(tensors, shapes, args.to, assets=source, dtype=args.dtype or dtype_of(source),
                 max_shard_bytes=args.max_shard_gb * 1e9)  # fmt: skip
    print(f"exported to {args.to}")
    return 0
