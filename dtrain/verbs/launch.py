"""Train: compose the configuration, plan, prepare the data, start every rank, and see it through."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import RunError, UserError
from dtrain.runs.outcomes import STOPPED
from dtrain.verbs import _overrides

if TYPE_CHECKING:
    from dtrain.checkpoint.resume import Start
    from dtrain.config.schema import Config
    from dtrain.data.prepare import Prepared
    from dtrain.launchers.muster import Leader
    from dtrain.plan.propose import Proposal
    from dtrain.runs import Outcome, RunDir
    from dtrain.verbs._told import Wish


def add(parser: argparse.ArgumentParser) -> None:
    _overrides.add(parser)
    parser.add_argument("-m", "--multirun", action="store_true", help="a run for each combination of key=a,b values")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed configuration, and start nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the command, and start nothing")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    from dtrain.config.compose import sweep
    from dtrain.verbs import _sweep, _told

    if not args.help and not args.cfg and not args.multirun:
        return launch(args.overrides, args)
    _told.let_in()
    if args.help:
        print(_overrides.help_text(args.parser, args.config_dir), end="")
        return 0
    if args.cfg:
        return _print_config(args.overrides, args.config_dir)
    return _sweep.launch(sweep(args.overrides, args.config_dir), args)


def launch(overrides: list[str], args: argparse.Namespace) -> int:
    """One run, from what was typed to its exit code; or to the job that will do that."""
    from dtrain.verbs import _told

    with _told.heeded() as wish:
        return _launch(overrides, args, wish)


def _launch(overrides: list[str], args: argparse.Namespace, wish: Wish) -> int:
    from dtrain.plan.describe import describe
    from dtrain.plan.propose import propose
    from dtrain.runs import RunDir
    from dtrain.verbs import _afar, _nodes, _submit, _sweep

    proposal = propose(overrides, args.config_dir)
    config, plan = proposal.config, proposal.plan
    run = RunDir(Path(config.run.dir) / config.run.name)
    wish.known(run, config.launcher.restarts().code or STOPPED)
    if not args.multirun:
        _sweep.check_no_array([config.launcher], "this is one run; add -m and several values, or leave it out")
    if config.launcher.calls(words(overrides, args), run.nodes):
        with wish.heeding():
            return (_afar.show if args.dry_run else _afar.launch)(run, proposal, words(overrides, args))
    job = config.launcher.job(run.path, words(overrides, args))
    if plan.topology.nodes > 1 and job is None and not args.dry_run:
        return _nodes.launch(run, proposal, wish)
    print(describe(config, plan), flush=True)
    if job is not None:
        with wish.heeding():
            return _submit.show(job) if args.dry_run else _submit.submit(job, [run], [proposal])
    return _show_command(run, proposal) if args.dry_run else _alone(run, proposal, wish)


def _alone(run: RunDir, proposal: Proposal, wish: Wish) -> int:
    from dtrain.verbs import _restart

    check_folder(run)
    with wish.watching():
        prepared, settled = prepare_all(proposal)
    with run.lock(note=say):
        while True:
            outcome = train(run, proposal, prepared, settled, wish)
            code = tell(outcome, run, settled)
            if not _restart.again(run, outcome, settled, wish, say):
                return code


def words(overrides: list[str], args: argparse.Namespace) -> list[str]:
    """What is to be typed elsewhere for the same run."""
    where = [] if args.config_dir is None else ["--config-dir", str(args.config_dir.absolute())]
    return ["launch", *where, *overrides]


def _show_command(run: RunDir, proposal: Proposal) -> int:
    from dtrain.config.spec import Meeting

    topology = proposal.plan.topology
    meeting = None if topology.nodes == 1 else Meeting("HOST", 0, "ID", is_host=True, local="ADDRESS", interface=None)
    command = proposal.config.launcher.command(run.path, worker(run, proposal), topology, meeting)
    print("command    " + " ".join([*(f"{k}={shlex.quote(v)}" for k, v in command.env.items()),
                                    shlex.join(command.argv)]))  # fmt: skip
    return 0


def worker(run: RunDir, proposal: Proposal) -> list[str]:
    """What every rank is started with."""
    return ["worker", "--run-dir", str(run.path), *(f"--plugin={name}" for name in proposal.plugins)]


def check_folder(run: RunDir) -> None:
    from dtrain.runs import check

    check(run.path)
    check(run.checkpoints)  # it may be a link to another disk


def prepare_all(proposal: Proposal) -> tuple[Prepared, Config]:
    """Fetch, make or find what the ranks read, and settle by it what was open."""
    from dtrain.data.prepare import prepare
    from dtrain.plan.plan import lr_of
    from dtrain.plan.settle import settle
    from dtrain.verbs import _prompts

    config = proposal.config
    cache = Path(config.run.cache) if config.run.cache else Path(config.run.dir) / ".cache"
    prepared = prepare(config.dataset, config.objective, config.model, config.template, seed=config.run.seed,
                       eval_fraction=config.eval.fraction, cache=cache.absolute(), say=say)  # fmt: skip
    for line in prepared.lines():
        say(line)
    settled = settle(config, proposal.plan, proposal.strategies, prepared.objective, prepared.num_epoch_rows)
    _prompts.check(settled, prepared)
    batch = proposal.plan.batch
    if settled.batch.global_batch != batch.global_batch:
        batch = dataclasses.replace(batch, global_batch=int(settled.batch.global_batch or 0))
        say(f"batch.global_batch=auto takes {batch.global_batch}: the data has no more rows; shorter rows, by "
            f"dataset.max_length, make more of them")  # fmt: skip
    if padding := prepared.padding(batch, config.run.seed):
        say(padding)
    say(f"objective: {type(prepared.objective).__name__.lower()}")
    if settled.optim.lr != proposal.plan.lr or proposal.plan.other_lrs:
        say(lr_of(config, prepared.objective)[1])
    return prepared, settled


def train(run: RunDir, proposal: Proposal, prepared: Prepared, settled: Config, wish: Wish,
          leader: Leader | None = None) -> Outcome:  # fmt: skip
    """Go on from where there is something, start every rank and see them through. To be called by the holder of the
    run's lock.

    With `leader`, other machines start theirs too.
    """
    from dtrain.checkpoint.identity import identity
    from dtrain.checkpoint.resume import choose
    from dtrain.config.schema import seconds
    from dtrain.data.tokenizer import tokenizer_digest
    from dtrain.launchers.supervise import deadline_of, supervise
    from dtrain.verbs import _oom, _requeue

    with wish.watching(), run.beating():  # the weights that stay as they are may have to be read
        settled = _oom.fitting(run, settled, say)
        _warn_of_room(run, settled, proposal.plan.checkpoint_bytes)
        said = identity(settled, data=prepared.digest, tokenizer=tokenizer_digest(prepared.assets),
                        assets=prepared.assets, base=_base(settled, prepared))  # fmt: skip
        wish.forget()
        clean(run)
        start = choose(run, settled, said, say)
        _refuse_done(run, settled, start)
    if leader is not None:
        with wish.watching():
            nodes = leader.wait()
        if nodes != proposal.plan.topology.nodes:
            proposal, settled = _on(nodes, run, proposal, prepared)
    attempt = run.new_attempt()
    _record(run, attempt, settled, proposal, prepared, said, start)
    limit = settled.run.time_limit
    limit_s = None if limit is None else seconds(limit)
    meeting = leader.meet(attempt, deadline_of(limit_s)) if leader else None
    command = settled.launcher.command(run.path, worker(run, proposal), proposal.plan.topology, meeting)
    outcome = supervise(command, run, attempt, limit_s=limit_s, hang_after=settled.run.hang_after, team=leader,
                        heed=wish.heed)  # fmt: skip
    run.add_attempt(attempt, ended=outcome.kind)
    run.event("ended", attempt=attempt, outcome=outcome.kind)
    _requeue.decide(run, outcome, settled.launcher.restarts().most, say)
    return outcome


def _on(nodes: int, run: RunDir, proposal: Proposal, prepared: Prepared) -> tuple[Proposal, Config]:
    """The same for so many machines: another split of the same global batch."""
    from dtrain.plan.settle import settle
    from dtrain.verbs import _oom

    here = proposal.on(nodes)
    anew = settle(here.config, here.plan, here.strategies, prepared.objective, prepared.num_epoch_rows)
    say(
        f"launcher.nodes: {nodes} of up to {proposal.plan.topology.nodes} machines; batch: {here.plan.batch.describe()}"
    )
    return here, _oom.fitting(run, anew, say)


def tell(outcome: Outcome, run: RunDir, settled: Config) -> int:
    """Say how it ended; returns the exit code: of a stop that which has the launcher's cluster start it again."""
    from dtrain.launchers.verdict import explain
    from dtrain.verbs._report import report

    if outcome.failure is not None and outcome.failure.kind == "user":
        return report(UserError(outcome.failure.message))
    text = explain(outcome, run)
    print(text, file=sys.stdout if outcome.exit_code == 0 else sys.stderr, flush=True)
    if outcome.exit_code == 0:
        print(_next_steps(run), flush=True)
    if outcome.kind == "stopped":
        return settled.launcher.restarts().code or STOPPED
    return outcome.exit_code


def clean(run: RunDir) -> None:
    """End and remove what a launch that was killed has left."""
    from dtrain.folders import remove_leftovers
    from dtrain.launchers.supervise import end_left
    from dtrain.verbs import _requeue

    _requeue.forget(run)
    if left := end_left(run):
        say(f"ended {left} processes of this run, which a killed launch had left")
    for path in [*remove_leftovers(run.checkpoints, mine=True), *remove_leftovers(run.path, mine=True)]:
        say(f"removed {path}, which a killed save left")


def _base(settled: Config, prepared: Prepared) -> str | None:
    """The digest of the weights that stay as they are; None where all are trained, or made from the seed."""
    from dtrain.models.assets import weights_digest

    if not settled.tuning.keeps() or not settled.model.trained():
        return None
    return weights_digest(prepared.assets, prepared.dir.parent, say)


def _record(run: RunDir, attempt: int, settled: Config, proposal: Proposal, prepared: Prepared,
            identity: Mapping[str, Any], start: Start | None) -> None:  # fmt: skip
    """Write what every rank reads, and what a person wants to know later."""
    from dtrain.config import frozen
    from dtrain.models.assets import copy_assets
    from dtrain.runs import versions
    from dtrain.runs.account import lost_after

    frozen.write(run.config, settled)
    plan = proposal.plan
    run.update_manifest(
        name=run.name, strategy=plan.strategy, size=plan.topology.size, steps=settled.train.steps,
        topology=dataclasses.asdict(plan.topology), device=plan.device, config_digest=frozen.digest(settled),
        data={"dir": str(prepared.dir), "assets": str(prepared.assets), "digest": prepared.digest,
              "rows": prepared.num_epoch_rows, "eval_rows": prepared.num_eval_rows, "counts": prepared.counts,
              "by_source": prepared.by_source, "first": prepared.first},
        identity=dict(identity), resume=[str(path) for path in start.candidates] if start else [],
        notes=list(plan.notes), **versions(),
    )  # fmt: skip
    copy_assets(prepared.assets, run.model)
    step, differences = (start.step, start.differences) if start else (0, ())
    lost, lost_s = lost_after(run, step)
    if lost:
        say(f"resume: {lost} step{'s' * (lost > 1)} after step {step} had not been saved, {lost_s:.1f} s of training: "
            f"done again")  # fmt: skip
    run.add_attempt(attempt, size=plan.topology.size, strategy=plan.strategy, micro_batch=settled.batch.micro_batch,
                    first_step=step, differences=list(differences))  # fmt: skip
    run.event("launched", attempt=attempt, strategy=plan.strategy, size=plan.topology.size, step=step,
              lost_steps=lost, lost_s=round(lost_s, 3))  # fmt: skip


def _refuse_done(run: RunDir, settled: Config, start: Start | None) -> None:
    outcome = run.read_outcome()
    if outcome is None or outcome.kind != "done":
        return
    assert settled.train.steps is not None
    if start is not None and start.step < settled.train.steps:
        return
    if start is None or start.step == settled.train.steps:
        raise RunError(f"run.name={run.name}: this run is done, and a new one would write over it; type another "
                       f"run.name, or remove {run.path}; train.steps=N with 'resume.allow=[train.steps]' goes on "
                       f"with it")  # fmt: skip
    raise RunError(f"train.steps={settled.train.steps}: {start.candidates[0]} is beyond that already")


def _warn_of_room(run: RunDir, settled: Config, checkpoint_bytes: int) -> None:
    """A save is refused where there is no room for it: better to know before the first step."""
    there = next(folder for folder in run.path.parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    need = (settled.checkpoint.keep_last + 1) * checkpoint_bytes
    if free < need:
        say(f"warning: {free / 1e9:,.2f} GB are free in {there}, and checkpoints take up to "
             f"{need / 1e9:,.2f} GB (checkpoint.keep_last={settled.checkpoint.keep_last}, and the next): a save that "
             f"finds no room fails")  # fmt: skip


def _next_steps(run: RunDir) -> str:
    from dtrain.models.outputs import has_outputs

    where = shlex.quote(str(run.path))
    pictures = {"curve": run.path / "loss.png", "confusion": run.path / "confusion.png"}
    writes = f"dtrain generate {where} --prompt '...'   (with --chat after conversations)"
    further = [f"dtrain runs show {where}"] if has_outputs(run.model) else [writes, f"dtrain runs show {where}"]
    return "\n".join([
        f"export     {run.export}",
        *(f"{name:<10} {picture}" for name, picture in pictures.items() if picture.is_file()),
        f"next       {further[0]}",
        *(f"           {one}" for one in further[1:]),
    ])  # fmt: skip


def _print_config(overrides: list[str], config_dir: Path | None) -> int:
    from dtrain.config import frozen
    from dtrain.config.compose import dump_yaml
    from dtrain.plan.propose import configure

    config, _ = configure(overrides, config_dir)
    print(dump_yaml(frozen.to_plain(config)), end="")
    return 0


def say(line: str) -> None:
    print(line, flush=True)
