"""`dtrain ckpt import`: what another tool saved, as a checkpoint that a run can start from."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

from dtrain.errors import CheckpointError

SUMMARY = "make a checkpoint of what DeepSpeed (universal) or torch.distributed.checkpoint saved"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder with zero/, as ds_to_universal makes it, or with .metadata")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make; it must not be there")
    parser.add_argument("--samples", type=int, required=True, metavar="N",
                        help="rows of the new run's order that count as consumed, which no other tool knows: it goes "
                             "on with the next; 0 is from the first")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N",
                        help="steps done, the place in the schedule (as many as the optimizer counts)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for name, value in (("--samples", args.samples), ("--step", args.step)):
        if value is not None and value < 0:
            raise CheckpointError(f"{name} {value}: must be at least 0")
    if args.to.exists():
        raise CheckpointError(f"--to {args.to}: is there already; name a new folder")
    from dtrain.checkpoint.foreign import open_source, write

    source = open_source(args.source)
    step = source.updates if args.step is None else args.step
    if step is None:
        raise CheckpointError(f"{args.source}: does not say how many steps it has done; give --step N")
    made = write(source, args.to, step=step, samples=args.samples)
    num = sum(math.prod(shape) for shape in source.shapes.values())
    print(f"{source.kind}: {len(source.shapes)} parameters of {num:,} elements, with "
          f"{', '.join(source.states)} after {made.counters['updates']:g} updates")  # fmt: skip
    if source.left_out:
        more = f" and {len(source.left_out) - 8} more" if len(source.left_out) > 8 else ""
        print(f"left out, without optimizer state: {', '.join(source.left_out[:8])}{more}")
    print(f"made {args.to}: step {made.step}, {args.samples:,} rows consumed, {made.num_bytes / 1e9:,.3f} GB")
    print(f"next       dtrain launch run.name=... resume={shlex.quote(str(args.to))}")
    return 0
