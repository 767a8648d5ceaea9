"""`make faults`: runs every test that shows what a fault does, and writes what came of it into docs/reliability.md.

What took how long, and how many steps were lost, the tests measure (`tests/measured.py`), most of it from the events that a
run has written itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.measured import DETECTED, LOST

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
OTHER = ROOT / "bench" / "trainer_faults.json"
BEGIN, END = "<!-- written by make faults -->", "<!-- end -->"
ALSO = ("tests/faults", "tests/ranks/test_hang.py", "tests/ranks/test_supervise.py", "tests/cluster")
"""What is run besides what the rows name."""

FAULTS, E2E, CONTRACT, CLUSTER, RANKS, UNIT = (
    f"tests/{name}" for name in ("faults", "e2e", "contract", "cluster", "ranks", "unit")
)


class Row(NamedTuple):
    fault: str
    expected: str
    shown: tuple[str, ...] = ()
    """Tests, by how their names begin."""
    missing: str = ""
    """What of it is not shown, and why."""


ROWS: dict[str, Row] = {
    "1": Row("all ranks killed (kill -9) as a save begins", "goes on from the save before", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.stage",)),
    "2": Row("... in the middle of a rank's file", "the same; the rest is removed at the next start", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.tensors", f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.mid")),
    "3": Row("... before the manifest", "the same", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.manifest",)),
    "4": Row("... before the rename that makes it count", "the same", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.rename",)),
    "5": Row("... after it, before `latest` points there", "goes on from the new one: what is there decides", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.committed",)),
    "6": Row("... while an old one is removed", "the newest is whole; what is left of the old one goes", (f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[ckpt.pointed", f"{FAULTS}/test_kill.py::test_killed_at_a_phase_of_a_save[discard")),
    "7": Row("... at 50 random moments", "each time the end is that of a run without, to the bit", (f"{FAULTS}/test_kill.py::test_killed_at_random_moments", f"{FAULTS}/test_command.py::test_everything_killed_at_once")),
    "8": Row("a file of the newest checkpoint is cut off", "passed over before it is loaded; exit 2 where it was asked for by name", (f"{FAULTS}/test_damage.py::test_a_run_goes_on_from_the_newest_that_is_whole[half]", f"{FAULTS}/test_damage.py::test_a_checkpoint_asked_for_by_name")),
    "9": Row("one byte of it is another", "found at all of 64 places and more; passed over", (f"{FAULTS}/test_damage.py::test_a_changed_byte", f"{FAULTS}/test_damage.py::test_a_run_goes_on_from_the_newest_that_is_whole[flipped]")),
    "10": Row("a file is missing or foreign, the manifest is edited or names files elsewhere", "told with the reason; nothing outside is read", tuple(f"{FAULTS}/test_damage.py::{name}" for name in ("test_a_file_that_is_not_what_was_written", "test_a_foreign_file", "test_an_edited_manifest", "test_a_manifest_that_is_none", "test_no_file_elsewhere", "test_a_run_goes_on_from_the_newest_that_is_whole[missing]", "test_a_run_goes_on_from_the_newest_that_is_whole[foreign]"))),
    "11": Row("`latest` is empty, or points to nothing", "the checkpoints decide", (f"{FAULTS}/test_damage.py::test_a_pointer_decides_nothing",)),
    "12": Row("a second job on the same run", "exit 2; a lock that a dead process left is taken over", (f"{FAULTS}/test_storage.py::test_a_second_job", f"{E2E}/test_refusals.py::test_two_launches_of_one_run", f"{UNIT}/runs/test_lock.py")),
    "13": Row("the disk fills up in a save", "stops, or warns and tries the next; older ones stay", tuple(f"{FAULTS}/test_storage.py::{name}" for name in ("test_a_full_disk_stops", "test_told_to_warn", "test_a_disk_that_fills_up", "test_a_file_that_the_system_cuts_off", "test_where_there_is_no_room"))),
    "14": Row("the folder cannot be written", "exit 2 before data is prepared or a rank is started", (f"{FAULTS}/test_storage.py::test_a_folder_that_cannot_be_written", f"{E2E}/test_refusals.py::test_run_dir_is_a_file", f"{E2E}/test_refusals.py::test_run_dir_cannot")),
    "15": Row("a save takes longer than the time between two", "one at a time, in one buffer; the next is postponed, and that is said", (f"{FAULTS}/test_storage.py::test_saves_on_a_slow_disk",)),
    "16": Row("SIGTERM to the launcher", "all save after one step, exit 75; a second one ends it at once", (f"{E2E}/test_stop_and_go_on.py::test_told_to_stop_it_saves_and_goes_on[15]", f"{RANKS}/test_supervise.py::test_one_signal_stops_with_a_save[15]", f"{RANKS}/test_supervise.py::test_a_second_signal")),
    "17": Row("SIGUSR1 to one rank, or to every process, as Slurm sends it", "all save after one step, exit 75", (f"{E2E}/test_stop_and_go_on.py::test_a_signal_to_one_rank", f"{RANKS}/test_supervise.py::test_a_signal_to_every_process")),
    "18": Row("Ctrl-C", "saves at the end of the step, a line, no traceback", (f"{E2E}/test_stop_and_go_on.py::test_told_to_stop_it_saves_and_goes_on[2]", f"{E2E}/test_refusals.py::test_ctrl_c")),
    "19": Row("one rank killed", "exit 3, rank and signal named; started again where that is allowed", (f"{RANKS}/test_supervise.py::test_a_killed_rank", f"{FAULTS}/test_command.py::test_a_rank_killed_in_a_save", f"{FAULTS}/test_restart.py")),
    "20": Row("a rank is halted (SIGSTOP), spins or sleeps, and shall be found after 3 s", "exit 3, kind hang, the rank named, stacks of all", (f"{RANKS}/test_hang.py::test_the_rank_that_stands_still",)),
    "21": Row("a rank raises", "its own traceback, once; the others are quiet", (f"{RANKS}/test_supervise.py::test_the_first_failing_rank", f"{E2E}/test_main_job.py::test_a_rank_that_fails")),
    "22": Row("a rank leaves out a step", "exit 3 before anything is learned of it; where each rank was", (f"{FAULTS}/test_out_of_step.py", f"{UNIT}/runs/test_hang.py::test_one_that_is_a_step_behind")),
    "23": Row("a loss that is no number, on one rank", "no rank updates; exit 3, kind nonfinite, the rows named", (f"{E2E}/test_main_job.py::test_a_loss_that_is_not_finite", f"{CONTRACT}/test_seam.py::test_what_is_not_finite_stops_every_rank", f"{FAULTS}/test_storage.py::test_what_is_being_written_when_a_loss")),
    "24": Row("a gradient that is no number; a loss that leaps", "the same for a gradient; with `train.max_leap` a leap ends the run before the update, kind leap, and `train.leave_out` goes on without its rows", (f"{CONTRACT}/test_seam.py::test_what_is_not_finite_stops_every_rank", f"{CONTRACT}/test_leap.py")),
    "25": Row("a bit of one rank's parameters is another", "exit 3 before anything is saved of it, the parameter and the rank named", (f"{CONTRACT}/test_replicas.py::test_a_bit",)),
    "26": Row("rows that are broken in eleven ways", "file, line and reason of the first five, counts of all; exit 2, or left out up to a share", (f"{FAULTS}/test_rows.py::test_a_corrupt_row", f"{FAULTS}/test_rows.py::test_all_of_them", f"{FAULTS}/test_rows.py::test_what_is_left_out")),
    "27": Row("nothing to train on: no rows, all left out, nothing to learn", "exit 2 with the counts", (f"{FAULTS}/test_rows.py::test_nothing_to_train_on",)),
    "28": Row("fewer rows than a global batch", "exit 2 with both numbers and what to set", (f"{E2E}/test_refusals.py::test_fewer_rows",)),
    "29": Row("rows that are too long, or all padding", "cut, split or dropped as asked for, and counted; no division by zero", (f"{UNIT}/data/test_prepare.py::test_long_documents", f"{UNIT}/data/test_prepare.py::test_a_long_chat", f"{UNIT}/models/test_causal.py::test_no_target", f"{FAULTS}/test_rows.py::test_nothing_to_train_on[all rows too long]")),
    "30": Row("the data changed between two attempts", "exit 2 with what differs, unless allowed", (f"{FAULTS}/test_damage.py::test_changed_data",)),
    "31": Row("another number of ranks", "the same global batches and rows; exit 2 where that cannot be", (f"{FAULTS}/test_changed.py::test_other_strategies", f"{FAULTS}/test_changed.py::test_what_decides_the_result_is_refused[batch")),
    "32": Row("another strategy", "losses equal to 1e-6", (f"{FAULTS}/test_changed.py::test_other_strategies",)),
    "33": Row("another rate, model, tokenizer, seed", "exit 2 with what differs; a rate may be allowed, another model not", (f"{FAULTS}/test_changed.py::test_what_decides_the_result_is_refused", f"{FAULTS}/test_changed.py::test_with_leave")),
    "34": Row("a mistake in what is typed", "exit 2, all of them at once, with key, value and what was meant", (f"{UNIT}/config/test_refused.py", f"{E2E}/test_refusals.py::test_a_mistake_is_quick")),
    "35": Row("a tokenizer without a template, or with one that fails", "exit 2 that names it; none is made up", (f"{E2E}/test_refusals.py::test_conversations_and_a_tokenizer", f"{UNIT}/data/test_chat.py::test_a_broken_template", f"{UNIT}/models/test_hf.py::test_a_missing_padding_token")),
    "36": Row("adapters for layers that are not there, an unknown model, tied weights", "exit 2 with names that are near", (f"{UNIT}/tuning/test_tuning.py::test_what_the_model_has_not", f"{E2E}/test_refusals.py::test_a_model_that_is_not_there", f"{UNIT}/models/test_weights.py::test_a_tied_tensor")),
    "37": Row("the port is taken", "exit 3 with what to type", (f"{FAULTS}/test_limits.py::test_a_port_that_is_taken",)),
    "38": Row("hosts that are no hosts, or would be options of ssh", "exit 2, nothing is started", (f"{UNIT}/launchers/test_torchrun.py::test_what_is_no_host", f"{UNIT}/launchers/test_torchrun.py::test_hosts", f"{UNIT}/launchers/test_deepspeed.py::test_what_is_no_hostfile", f"{UNIT}/launchers/test_deepspeed.py::test_only_names_of_machines")),
    "39": Row("quotes, line breaks, `$(...)` and `;` in what is typed", "arrive as they are, in every launcher", (f"{UNIT}/launchers/test_slurm.py::test_bash_reads", f"{UNIT}/launchers/test_torchrun.py::test_what_is_typed", f"{UNIT}/launchers/test_k8s.py::test_nothing_typed", f"{UNIT}/launchers/test_local.py::test_argv", f"{UNIT}/launchers/test_deepspeed.py::test_a_shell_there_reads")),
    "40": Row("a checkpoint or configuration made to run something", "refused; nothing runs, nothing outside is read", (f"{FAULTS}/test_damage.py::test_nothing_of_a_forged", f"{FAULTS}/test_damage.py::test_a_huge_manifest", f"{FAULTS}/test_damage.py::test_a_forged_manifest", f"{UNIT}/checkpoint/test_foreign.py", f"{UNIT}/config/test_config_dir.py::test_a_file_runs_nothing")),
    "41": Row("secrets in what is typed or in the environment", "in no file of the run, and not on the screen", (f"{UNIT}/runs/test_secrets.py", f"{UNIT}/verbs/test_submit.py::test_no_secret", f"{E2E}/test_refusals.py::test_what_is_printed_of_a_secret", f"{UNIT}/launchers/test_deepspeed.py::test_secrets_are_in_no_argv")),
    "42": Row("Weights & Biases without a key, a network or a disk", "training goes on; said once", (f"{UNIT}/trackers/test_wandb.py",)),
    "43": Row("the clock jumps; times of files lie", "steps decide; the lock holds", (f"{FAULTS}/test_clocks.py",)),
    "44": Row("no HOME, locale C, folders with blanks, quotes and links", "works", (f"{E2E}/test_refusals.py::test_no_home", f"{CLUSTER}/test_torchrun.py::test_two_machines_train", f"{FAULTS}/test_storage.py::test_a_disk_that_fills_up")),
    "45": Row("a rank gets no more memory", "exit 3, the rank, and what needs less; or the step again in smaller micro-batches", (f"{FAULTS}/test_limits.py::test_a_limit_of_the_system_is_named[_no_more_memory", f"{FAULTS}/test_oom.py"), "of a device, only as an error that is raised: no GPU took part"),
    "46": Row("no more open files; /dev/shm is full", "exit 3 with the limit to raise; 2 where data are being prepared", (f"{FAULTS}/test_limits.py::test_a_limit_of_the_system_is_named[_no_more_files", f"{FAULTS}/test_rows.py::test_no_room_for_processes", f"{UNIT}/runs/test_hints.py::test_each_known_cause"), "/dev/shm by an error that is raised, and of ranks only by its message: on CPU they put nothing there"),
    "47": Row("a process that prepares data dies", "exit 2, nothing is started and nothing left; there are none while ranks run: each reads its own rows", (f"{FAULTS}/test_rows.py::test_a_process_that_tokenises",)),
    "48": Row("100 times saved and gone on with", "the weights of a run without; no more files, threads or memory", (f"{CONTRACT}/test_cycles.py",)),
    "49": Row("SIGTERM to one rank as it starts, evaluates, saves or exports", "all stop at one place, saved; an export is ended first", (f"{FAULTS}/test_told.py",)),
    "50": Row("the shared folder is lost", "exit 3, kind storage; nothing is saved below it; goes on once it is back", (f"{FAULTS}/test_limits.py::test_a_shared_folder_that_is_lost",)),
    "51": Row("a machine is killed, and another comes (`launcher.nodes=1:2`)", "goes on with one, then with two; the same batches", (f"{CLUSTER}/test_elastic.py::test_a_run_goes_on_with_whoever_is_there",)),
    "52": Row("a rank of one of two machines is killed, or stands still", "both end, the rank is named", (f"{CLUSTER}/test_torchrun.py::test_a_killed_rank", f"{CLUSTER}/test_torchrun.py::test_ranks_of_both", f"{CLUSTER}/test_torchrun.py::test_after_a_failure")),
    "53": Row("a Slurm job meets its time limit", "saves, is queued again, goes on", (f"{CLUSTER}/test_slurm.py::test_the_time_limit",)),
    "54": Row("a Slurm job is told to stop (`scancel --signal`), its node is drained, a rank is killed, all of one node is killed", "queued again each time, waits for the node, ends all the same", (f"{CLUSTER}/test_slurm.py::test_whatever_becomes_of_it",)),
    "55": Row("a pod is told to go", "made again; the run goes on", (f"{CLUSTER}/test_pods.py",)),
}  # fmt: skip


@dataclasses.dataclass
class Ran:
    """What became of one."""

    outcome: str = "passed"
    why: str = ""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


class Recorder:
    """Hears of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, Ran] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, Ran())
        if report.outcome != "passed" and test.outcome != "failed":
            test.outcome = report.outcome
            test.why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        test.measured |= dict(report.user_properties)


def of(row: Row, tests: dict[str, Ran]) -> list[Ran]:
    return [test for name, test in tests.items() if name.startswith(row.shown)] if row.shown else []


def happened(row: Row, tests: list[Ran]) -> str:
    """In words, from what was run."""
    passed, failed, skipped = (
        [one for one in tests if one.outcome == kind] for kind in ("passed", "failed", "skipped")
    )
    words = []
    if failed:
        words.append(f"**not as expected** in {len(failed)} of {len(tests)} tests")
    elif passed:
        words.append(f"as expected, {len(passed)} test{'s' * (len(passed) > 1)}")
    words += sorted({f"not run here: {one.why.removeprefix('Skipped: ')}" for one in skipped})
    words += [f"not shown{' in full' if passed else ''}: {row.missing}"] if row.missing else []
    return "; ".join(words) or "not shown: not run"


def figure(tests: Iterable[Ran], name: str, form: str) -> str:
    """The largest of what was measured."""
    found = [one.measured[name] for one in tests if name in one.measured]
    return format(max(found), form) if found else ""


HEAD = (
    "| | what happens | expected | what came of it | found after, s | steps lost | Trainer |",
    "|--:|---|---|---|--:|--:|---|",
)


def line(number: str, tests: dict[str, Ran], others: dict[str, str]) -> str:
    """A row as it stands in the page."""
    row = ROWS[number]
    mine = of(row, tests)
    cells = [number, row.fault, row.expected, happened(row, mine), figure(mine, DETECTED, ".1f"), figure(mine, LOST, ".0f"),
             others.get(number, "")]  # fmt: skip
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page(lines: Sequence[str], made: str) -> str:
    """What stands between the marks, of all rows."""
    came = [one.split(" | ")[3] for one in lines]
    part = sum(one.startswith("as expected") and "not shown in full" in one for one in came)
    whole = sum(one.startswith("as expected") for one in came) - part
    where = f"{os.cpu_count()} cores of {platform.machine()}, no GPU, Python {platform.python_version()}"
    said = f"{datetime.now(UTC):%Y-%m-%d}, {where}: {whole} of {len(lines)} rows are shown, {part} in part."
    return "\n".join([said, "", *HEAD, *lines, *(["", made] if made else [])])


def written() -> str:
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(text: str) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def paths(numbers: Iterable[str]) -> list[str]:
    """What shows these rows, but for parameters: files, and how names of functions begin."""
    named = {name.partition("[")[0] for number in numbers for name in ROWS[number].shown}
    return sorted(name for name in named if not any(name != other and name.startswith(other) for other in named))


def whole_names(prefixes: Iterable[str]) -> list[str]:
    """Of the functions that begin so, as pytest wants to be asked for them."""
    found = []
    for prefix in prefixes:
        path, _, name = prefix.partition("::")
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines() if name else []
        names = [line.removeprefix("def ").partition("(")[0] for line in lines if line.startswith(f"def {name}")]
        found += [f"{path}::{one}" for one in names] if name else [path]
    return found


def main(asked: Sequence[str]) -> int:
    """`asked`: the rows to run again; all if there are none, and what else belongs to them."""
    os.environ["DTRAIN_FAULTS"] = "all"
    also = () if asked else ALSO
    numbers = asked or list(ROWS)
    named = [*also, *(name for name in paths(numbers) if not also or not name.startswith(also))]
    recorder = Recorder()
    code = pytest.main(["--rootdir", str(ROOT), *whole_names(named)], plugins=[recorder])
    others = json.loads(OTHER.read_text(encoding="utf-8")) if OTHER.exists() else {"rows": {}, "made": ""}
    before = {one.split(" | ")[0].removeprefix("| "): one for one in written().splitlines()}
    lines = [line(one, recorder.tests, others["rows"]) if one in numbers else before[one] for one in ROWS]
    write(page(lines, others["made"]))
    print(f"written: {PAGE}")
    none = [prefix for number in numbers for prefix in ROWS[number].shown
            if not any(name.startswith(prefix) for name in recorder.tests)]  # fmt: skip
    if none:
        print(f"no test begins so: {none}", file=sys.stderr)
    return int(code) or bool(none)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
