from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config.spec import Job
from dtrain.errors import ConfigError, PlanError
from dtrain.launchers.slurm import Slurm
from dtrain.plan.machine import Machine
from dtrain.plan.world import Topology
from tests.unit.launchers.test_torchrun import MEETING, NASTY

LOGIN = Machine(cores=4, memory_bytes=2**33, gpus=0, gpu_name="", gpu_memory_bytes=0)
NODE = dataclasses.replace(LOGIN, gpus=8, gpu_name="H100", gpu_memory_bytes=2**36)
SITE = {"partition": "gpu", "account": "a1", "qos": "high", "constraint": "a100|h100", "mem": "0", "time": "08:00:00",
        "cpus_per_task": 64, "options": ("--exclusive", "--exclude=n[3-5]"), "gpus_per_node": 8}  # fmt: skip


@pytest.fixture(autouse=True)
def _login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "DTRAIN_"))]:
        monkeypatch.delenv(name)


def job(run_dir: str = "/runs/a b", words: tuple[str, ...] = ("launch", "run.name=a b"), **values: Any) -> Job:
    made = Slurm(**values).job(Path(run_dir), words)
    assert made is not None
    return made


def test_the_plan_is_of_the_nodes_and_not_of_this_machine() -> None:
    launcher = Slurm(nodes=4, gpus_per_node=8)
    there = launcher.machine(LOGIN)
    assert there.gpus == 8
    assert launcher.topology("cuda", there) == Topology(nodes=4, procs_per_node=8)
    assert Slurm(nodes=2).topology("cpu", Slurm().machine(NODE)) == Topology(nodes=2, procs_per_node=1)
    assert Slurm().machine(NODE).gpus == 0
    assert Slurm(nodes=2, procs=3).topology("cpu", LOGIN).size == 6
    with pytest.raises(PlanError, match="launcher.gpus_per_node=0"):
        Slurm().topology("cuda", LOGIN)


def test_on_its_node_a_task_starts_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_BATCH", "7.0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    launcher = Slurm(nodes=2, gpus_per_node=8)
    assert launcher.job(Path("/r"), ["launch"]) is None
    assert (launcher.gathering().leads, launcher.gathering().start) == (False, "7.0.0")
    assert launcher.machine(NODE) == NODE
    with pytest.raises(PlanError, match="no GPU is visible"):
        launcher.topology("cuda", LOGIN)
    argv = launcher.command(Path("/r"), ["worker"], Topology(2, 8), MEETING).argv
    assert "--nnodes=2" in argv
    assert argv[:2] != ["srun"]
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert launcher.gathering().leads is True


def test_what_a_site_asks_for_stands_in_the_script() -> None:
    script = job(
        nodes=4, modules=("cuda/12.4",), prolog=("source /opt/site/env.sh && ulimit -l unlimited",), **SITE
    ).script
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=gpu",
                 "#SBATCH --account=a1", "#SBATCH --qos=high", "#SBATCH --constraint='a100|h100'", "#SBATCH --mem=0",
                 "#SBATCH --time=08:00:00", "#SBATCH --cpus-per-task=64", "#SBATCH --signal=B:USR1@180",
                 "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --exclusive", "#SBATCH '--exclude=n[3-5]'",
                 "module load cuda/12.4", "source /opt/site/env.sh && ulimit -l unlimited", "run='/runs/a b'"):  # fmt: skip
        assert line in script.splitlines(), line
    assert "DTRAIN_DEADLINE=$(($(date +%s) + 28800))" in script
    assert "scontrol requeue" not in job(requeue=False).script
    assert "#SBATCH --no-requeue" in job(requeue=False).script


def test_containers() -> None:
    by_apptainer = job(container="/img/a b.sif", mounts=("/data:/data",), gpus_per_node=1).script
    assert "  apptainer exec\n  --nv\n  --bind /data:/data\n" in by_apptainer.replace("\n  --bind\n", "\n")
    assert "  '/img/a b.sif'\n  python3\n" in by_apptainer
    by_pyxis = job(container="nvcr.io#x", container_by="pyxis", mounts=("/a", "/b b")).script
    assert "--container-image='nvcr.io#x' \\" in by_pyxis
    assert "--container-mounts='/a,/b b' \\" in by_pyxis


@pytest.mark.parametrize(("values", "says"), [
    ({"partition": "a b"}, "launcher.partition='a b'"), ({"account": "a\n#SBATCH --uid=0"}, "launcher.account="),
    ({"qos": "$(x)"}, "launcher.qos="), ({"options": ("-x",)}, "launcher.options: '-x'"),
    ({"options": ("--wrap=a;b",)}, "launcher.options"), ({"options": ("--x=a\nb",)}, "launcher.options"),
    ({"modules": ("a;b",)}, "launcher.modules"), ({"modules": ("$(x)",)}, "launcher.modules"),
    ({"time": "soon"}, "launcher.time=soon"), ({"time": "1.5"}, "launcher.time=1.5"), ({"time": "1:2:3:4"}, "launcher.time"),
    ({"options": ("--array=0-3",)}, "launcher.array_parallel"),
    ({"gpus_per_node": 2, "procs": 4}, "launcher.procs=4"), ({"mounts": ("/a",)}, "launcher.mounts"),
])  # fmt: skip
def test_what_does_not_belong_in_a_script_is_refused(values: dict[str, Any], says: str) -> None:
    assert [problem for problem in Slurm(**values).problems() if says in problem]


def test_good_values_are_no_problem() -> None:
    assert Slurm(**SITE).problems() == []
    assert [Slurm(time=time).problems() for time in ("90", "1:30", "01:30:00", "2-12", "2-12:30")] == [[]] * 5


def read_by_bash(script: str, folder: Path, **env: str) -> tuple[list[str], str]:
    """The words of the command and the folder, as bash reads them."""
    end = next(line for line in script.splitlines() if line.startswith("trap :"))
    head = script[: script.index(end)]
    out = folder / "words"
    text = head + 'printf "%s\\0" "$run" "${command[@]}" >"$OUT"\n'
    done = subprocess.run(["bash", "-u"], input=text.encode(), capture_output=True, cwd=folder, check=False,
                          env={"PATH": "/usr/bin:/bin", "OUT": str(out), "SLURM_JOB_ID": "1", **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = out.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    return words[1:], words[0]


def test_a_script_that_is_told_before_it_starts_anything_says_so(tmp_path: Path) -> None:
    """Asking Slurm for the time and loading modules takes seconds."""
    made = job(str(tmp_path / "r"), ("launch",), prolog=("mkdir r", "kill -USR1 $$"))
    read_by_bash(made.script, tmp_path)
    assert (tmp_path / "r" / "STOP").read_text() == "1.0\n"


@settings(max_examples=25, deadline=None)
@given(words=st.lists(NASTY, min_size=1, max_size=5), name=NASTY)
def test_bash_reads_what_was_typed(words: list[str], name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    if "\n" in name or "\\" in name:
        name = "plain"
    made = job("/runs/" + name, ("launch", *words))
    got, run = read_by_bash(made.script, folder)
    assert got == [sys.executable, "-u", "-m", "dtrain", "launch", *words]
    assert run == str(Path("/runs/" + name))
    assert [path.name for path in folder.iterdir()] == ["words"]


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.lists(st.tuples(NASTY, st.lists(NASTY, min_size=1, max_size=3)), min_size=2, max_size=4), data=st.data()
)
def test_bash_reads_what_was_typed_for_each_task(
    tasks: list[tuple[str, list[str]]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = [(Path("/runs", "plain" if set(name) & {"\n", "\\"} else name), ["launch", *words]) for name, words in tasks]
    made = Slurm().array(runs)
    assert made is not None
    place = data.draw(st.integers(0, len(runs) - 1))
    folder = tmp_path_factory.mktemp("run")
    got, run = read_by_bash(made.script, folder, SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID=str(place))
    assert got == [sys.executable, "-u", "-m", "dtrain", *runs[place][1]]
    assert run == str(runs[place][0])
    assert [path.name for path in folder.iterdir()] == ["words"]


WORD = st.from_regex(r"[A-Za-z0-9_.|&@:/-]{1,8}", fullmatch=True)
HEADER = ("partition", "account", "qos", "constraint", "mem", "time")


@settings(max_examples=80, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(HEADER), NASTY | WORD, max_size=3),
    options=st.lists(NASTY | WORD.map("--comment={}".format), max_size=2),
    modules=st.lists(NASTY | WORD, max_size=2),
    container=st.none() | NASTY,
    mounts=st.lists(NASTY, max_size=2),
    python=st.none() | NASTY,
)
def test_no_value_becomes_shell_or_a_line_of_the_header(
    header: dict[str, str], options: list[str], modules: list[str], container: str | None, mounts: list[str],
    python: str | None, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    values: dict[str, Any] = {**header, "options": tuple(options), "modules": tuple(modules), "container": container,
                              "mounts": tuple(mounts), "python": python}  # fmt: skip
    if problems := Slurm(**values).problems():
        assert all(problem.startswith("launcher.") for problem in problems)
        return
    script = job(**values).script
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    ours = [line.removeprefix("#SBATCH ") for line in job().script.splitlines() if line.startswith("#SBATCH")]
    expected = [*(f"--{key}={value}" for key, value in header.items()), *options]
    assert sorted(word for line in asked for word in shlex.split(line)) == sorted([*ours, *expected])
    assert len(asked) == len(ours) + len(expected)
    folder = tmp_path_factory.mktemp("run")
    words, _ = read_by_bash(script, folder)
    wanted = [one for one in (container, python) if one is not None] + (mounts if container is not None else [])
    assert all(one in words for one in wanted)
    assert [path.name for path in folder.iterdir()] == ["words"]


def test_an_array_is_handed_over_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(Path(f"/100% a/{i}"), ["launch", f"run.name={i}"]) for i in range(3)]
    made = Slurm(array_parallel=2).array(runs)
    assert made is not None
    assert list(made.submit) == ["sbatch", "--parsable", "--job-name=sweep", "--output=/100%% a/job-%A_%a.log",
                                 f"--chdir={Path.cwd()}", "--array=0-2%2"]  # fmt: skip
    assert made.task.format(job="17", place=2) == "17_2"
    assert 'scontrol requeue "$job"' in made.script
    assert "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" in made.script
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert Slurm().array(runs) is None, "in an allocation each is started there"


def test_a_template_that_knows_no_tasks_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.j2"
    mine.write_text("#!/bin/sh\nrun={{ run_dir }}\n")
    with pytest.raises(ConfigError, match=r"launcher.template=.*run_dir"):
        Slurm(template=str(mine)).array([(Path("/r/a"), []), (Path("/r/b"), [])])


def test_how_it_is_handed_over() -> None:
    made = job("/runs/100% a\nb".replace("\n", " "))
    assert list(made.submit) == ["sbatch", "--parsable", "--job-name=100__a_b", "--output=/runs/100%% a b/job-%j.log",
                                 f"--chdir={Path.cwd()}"]  # fmt: skip
    assert made.follow("17")["queue"] == ["squeue", "--jobs=17"]
    assert made.prepare
    assert not made.now
    assert not job(prepare="job").prepare


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_a_folder_that_slurm_would_read_as_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="run.dir"):
        job("/runs/" + name)


def test_in_an_allocation_the_script_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert job(nodes=2).now
    with pytest.raises(ConfigError, match=r"launcher.nodes=3: this shell is in job 5, with 2; .* unset SLURM_JOB_ID"):
        job(nodes=3)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.j2"
    mine.write_text("#!/bin/sh\n{% for word in command[-1:] %}{{ word }}{% endfor %} {{ nodes }}\n")
    assert job(template=str(mine), nodes=3).script == "#!/bin/sh\n'run.name=a b' 3\n"
    for text, says in [("{{ nope }}", "nope"), ("{% if %}", "line 1"), ("{{ command }}", "take its items"),
                       ("{{ run_dir.__class__.__mro__ }}", "launcher.template")]:  # fmt: skip
        mine.write_text(text)
        with pytest.raises(ConfigError, match=says):
            job(template=str(mine))
    with pytest.raises(ConfigError, match="No such file"):
        job(template=str(tmp_path / "none"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("values", [
    {}, {"requeue": False}, {**SITE, "modules": ("m",)}, {"container": "i", "mounts": ("/a",), "gpus_per_node": 2},
    {"container": "i", "container_by": "pyxis", "mounts": ("/a",), "time": "2-12"},
])  # fmt: skip
def test_shellcheck_has_nothing_to_say(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    where = '/runs/a\'s "b" $(c)'
    array = Slurm(**values).array([(Path(where, name), ["launch", "x='$y'"]) for name in "ab"])
    assert array is not None
    for script in (job(where, **values).script, array.script):
        path.write_text(script)
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert done.stdout == ""
