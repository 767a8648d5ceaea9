"""Whether this machine can train: versions, devices, kernels, disk, limits, and what the ranks say to each other.

A line each: ok, warn or fail, and what to do. Exit code 1 where something fails. On several machines it is started on
each, as by `srun dtrain doctor`, or typed with --nodes N; then clocks are compared and all ranks measured. With
--launcher slurm, or deepspeed, it is started on all nodes, and says in a line of each how it differs from the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dtrain.errors import ConfigError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where run folders are to be (runs)")
    parser.add_argument("--procs", type=int, metavar="N", help="processes here; one for each GPU, else two")
    parser.add_argument("--only", metavar="NAME,...", help="versions, devices, kernels, disk, limits, ranks")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines; in a step of Slurm, all of it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--launcher", metavar="NAME", help="start it on the nodes that this launcher starts runs on")
    parser.add_argument("overrides", nargs="*", metavar="launcher.KEY=VALUE", help="of that, such as launcher.nodes=4")


def run(args: argparse.Namespace) -> int:
    from dtrain.doctor.checks import CHECKS, Place
    from dtrain.doctor.nodes import found_with_others, meeting, node_name
    from dtrain.plan.machine import look

    names = list(CHECKS) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        raise ConfigError(f"--only={args.only}: {unknown[0]!r} is none of {', '.join(CHECKS)}")
    for key in ("procs", "nodes"):
        if (number := getattr(args, key)) is not None and number < 1:
            raise ConfigError(f"--{key}={number}: at least 1")
    if args.launcher is not None:
        from dtrain.verbs._doctor_nodes import on_all

        return on_all(args)
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: of a launcher; name it too, as --launcher slurm")
    machine = look()
    place = Place(args.dir.absolute(), args.procs or machine.gpus or 2, machine)
    team = meeting(args.nodes, place.folder)
    failed = False
    for name in names:
        for one in CHECKS[name](place) if team is None or name != "ranks" else found_with_others(team, place):
            failed = failed or one.state == "fail"
            print(json.dumps({"node": node_name(), **dataclasses.asdict(one)}) if args.json else one.line(), flush=True)
    return int(failed)
