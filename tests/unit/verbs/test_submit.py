"""What `dtrain launch launcher=slurm` hands over, to an sbatch that only writes down what it was given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import cli
from dtrain.runs import RunDir
from dtrain.runs.files import last_json

SBATCH = """\
#!/bin/sh
printf '%s\\0' "$@" >>"$SBATCH_GOT"
echo "${{SBATCH_SAYS-17;cluster}}"
exit {code}
"""
TYPED = ["launch", "model=tiny", "launcher=slurm", "launcher.nodes=2", "launcher.prepare=job", "run.name=a b"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "it's $(touch x)"
    (made / "bin").mkdir(parents=True)
    monkeypatch.chdir(made)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "DTRAIN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{made / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_GOT", str(made / "got"))
    sbatch(made)
    return made


def sbatch(place: Path, code: int = 0) -> None:
    path = place / "bin" / "sbatch"
    path.write_text(SBATCH.format(code=code))
    path.chmod(0o755)


def test_a_job_is_handed_over_and_can_be_followed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(TYPED) == 0
    run = place / "runs" / "a b"
    assert (place / "got").read_text().split("\0")[:-1] == [
        "--parsable", "--job-name=a_b", f"--output={run}/job-%j.log", f"--chdir={place}", f"{run}/job.sh"]  # fmt: skip
    said = capsys.readouterr().out
    assert "ranks      2 on cpu: 2 nodes x 1" in said
    assert "prepared in the job" in said
    assert "submitted  job 17" in said
    assert "squeue --jobs=17" in said
    assert "job-17.log" in said
    assert not (place / "x").exists()
    assert not (run / "logs").exists(), "nothing is started here"


def test_dry_run_shows_the_script_and_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*TYPED, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "submit     sbatch --parsable" in said
    assert "#SBATCH --nodes=2" in said
    assert not (place / "runs").exists()
    assert not (place / "got").exists()


def test_a_sweep_is_one_job_with_a_task_for_each(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*TYPED, "-m", "train.steps=40,80", "launcher.array_parallel=1"]) == 0
    names = ["a b-train.steps=40", "a b-train.steps=80"]
    assert sorted(path.name for path in (place / "runs").iterdir()) == names
    assert (place / "got").read_text().split("\0")[:-1] == [
        "--parsable", "--job-name=a_b-train.steps", f"--output={place}/runs/job-%A_%a.log", f"--chdir={place}",
        "--array=0-1%1", f"{place}/runs/{names[0]}/job.sh"]  # fmt: skip
    said = capsys.readouterr().out
    assert "submitted  job 17: 2 runs submitted, as its tasks 0 to 1" in said
    assert "runs done" not in said
    for i, name in enumerate(names):
        assert last_json(RunDir(place / "runs" / name).events)["job"] == f"17_{i}"
        assert (place / "runs" / name / "job.sh").read_text().count("train.steps=80\n") == 1


def test_runs_that_ask_for_different_jobs_are_submitted_by_themselves(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*TYPED, "-m", "launcher.nodes=2,3"]) == 0
    said = capsys.readouterr().out
    assert "the runs ask for different jobs" in said
    assert said.count("submitted  job 17;") == 2
    assert "--- 2 of 2 runs submitted" in said


@pytest.mark.parametrize(("typed", "says"), [
    ([], "this is one run; add -m and several values"),
    (["-m", "launcher.nodes=2,3"], "runs that differ in keys of launcher are jobs of their own"),
    (["-m", "train.steps=40,80"], "here the runs are started one after the other"),
])  # fmt: skip
def test_a_number_of_tasks_is_not_passed_over_where_there_are_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: list[str], says: str
) -> None:
    if "one after the other" in says:
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert cli.run([*TYPED, *typed, "launcher.array_parallel=4"]) == 2
    assert f"launcher.array_parallel=4: is of a sweep that is one job, and {says}" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_a_sweep_of_one_run_may_have_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which keeps to it; and so does each task of an array, which is typed without -m on its node."""
    assert cli.run([*TYPED, "-m", "train.steps=40", "launcher.array_parallel=4"]) == 0
    assert "submitted  job 17;" in capsys.readouterr().out


def test_a_dry_run_of_a_sweep_shows_its_one_script(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*TYPED, "-m", "train.steps=40,80", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("ranks      2 on cpu: 2 nodes x 1") == 2
    assert said.count("#!/bin/bash") == 1
    assert "--array=0-1 " in said
    assert not (place / "runs").exists()


def test_what_sbatch_refuses_is_told(place: Path) -> None:
    sbatch(place, code=1)
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *TYPED], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 2
    assert "sbatch: exit code 1" in done.stderr


def test_no_secret_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_averysecretvalue")
    assert cli.run(TYPED) == 0
    text = "".join(path.read_text() for path in (place / "runs").rglob("*") if path.is_file())
    assert "hf_averysecretvalue" not in text
    assert "#SBATCH" in text
