"""What `dtrain ckpt` says and does, on checkpoints made without a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtrain.checkpoint import verify
from dtrain.cli import run as dtrain
from dtrain.runs import RunDir
from dtrain.verbs import ckpt
from tests.unit.checkpoint.synthetic import Tensors, tensors, write
from tests.unit.test_source import HEAVY

SHAPES = {"embed": (4, 5), "norm": (7,)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Called `mine`, of five checkpoints on two ranks."""
    monkeypatch.chdir(tmp_path)
    found = _run(tmp_path / "runs" / "mine", "{keep_last: 2, keep_every: null, best_by: loss, best_mode: min}")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.5), (50, 4.0)):
        write(
            found.checkpoints,
            step,
            tensors(SHAPES, seed=step),
            cuts=[9],
            metrics={"loss": loss},
            tied={"head": "embed"},
        )
    return found


def _run(path: Path, checkpoint: str = "{}") -> RunDir:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"plugins: [nowhere_to_be_found]\ncheckpoint: {checkpoint}\n")
    return RunDir(path)


class _Said:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str, code: int = 0) -> str:
        """What is printed; of an error, what is said of it."""
        found = dtrain(["ckpt", *argv])
        out, err = self._capsys.readouterr()
        assert found == code, out + err
        return out if found in (0, 1) or not err else out + err


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> _Said:
    return _Said(capsys)


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def _steps(run: RunDir) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*"))


def _bytes(run: RunDir, step: int) -> int:
    return sum(path.stat().st_size for path in _folder(run, step).glob("rank-*"))


def _flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# --- ls


def test_ls(run: RunDir, said: _Said) -> None:
    (run.checkpoints / "latest").write_text("step-00000050\n")
    (run.checkpoints / "paper").write_text("step-00000050")
    (run.checkpoints / "old").write_text("step-00000005")
    (_folder(run, 30) / "rank-00001.safetensors").unlink()
    (_folder(run, 10) / "manifest.json").unlink()
    title, *rows, first, second, third = said("ls", "mine").splitlines()
    assert title.split() == ["step", "when", "size", "made", "by", "loss", "pointers", "state"]
    assert [row.split()[0] for row in rows] == ["50", "40", "30", "20", "10"]
    size = f"{_bytes(run, 50) / 1e3:.2f}"
    assert rows[0].split()[1:] == [
        "2030-01-02T03:04:05",
        size,
        "kB",
        "some",
        "x",
        "2",
        "4.0000",
        "latest,paper",
        "whole",
    ]
    assert rows[2].split()[-2:] == ["-", "damaged"]
    assert rows[4].split() == ["10", "-", "-", "-", "-", "-", "damaged"]
    assert len({row.index("some") for row in rows[:4]}) == 1  # columns
    assert first == f"step 30: {_folder(run, 30)}/rank-00001.safetensors: missing"
    assert second.startswith(f"step 10: {_folder(run, 10)}/manifest.json: missing")
    assert third == f"{run.checkpoints}/old: names 'step-00000005', which is not there"


def test_ls_shows_losses_and_what_the_best_is_told_by(tmp_path: Path, said: _Said) -> None:
    run = _run(tmp_path / "runs" / "mine")
    metrics = {"rewards/margin": 1.0, "rewards/accuracy": 0.5, "eval_loss": 2.0, "loss": 3.0}
    for step, config in ((10, {}), (20, {"checkpoint": {"best_by": "rewards/accuracy"}})):
        write(run.checkpoints, step, tensors(SHAPES), metrics=metrics, config=config)
        shown = ["loss", "eval_loss", *(["rewards/accuracy"] if config else [])]
        assert said("ls", str(run.path)).split("by", 1)[1].split()[: len(shown) + 1] == [*shown, "pointers"]
    assert json.loads(said("ls", str(run.path), "--json").splitlines()[0])["metrics"] == metrics


def test_ls_for_programs(run: RunDir, said: _Said) -> None:
    (_folder(run, 10) / "manifest.json").unlink()
    found = [json.loads(line) for line in said("ls", str(run.checkpoints), "--json").splitlines()]
    assert [one["step"] for one in found] == [50, 40, 30, 20, 10]
    assert found[0] == {"step": 50, "path": str(_folder(run, 50)), "time": "2030-01-02T03:04:05.678Z", "bytes": found[0]["bytes"],
                        "strategy": "some", "ranks": 2, "metrics": {"loss": 4.0}, "pointers": [], "problems": []}  # fmt: skip
    assert found[0]["bytes"] == _bytes(run, 50)
    assert "missing" in found[4]["problems"][0]


def test_a_run_without_checkpoints(run: RunDir, said: _Said) -> None:
    empty = _run(run.path.parent / "empty")
    assert said("ls", "empty") == f"no checkpoints in {empty.checkpoints}\n"
    for verb in ("show", "verify"):
        assert "no checkpoints; checkpoint.every_steps" in said(verb, "empty", code=2)
    for verb in ("ls", "show", "verify", "save", "prune"):
        assert "in runs/ there are: mine, empty" in said(verb, "none", code=2)


# --- show


def test_show(run: RunDir, said: _Said) -> None:
    text = said("show", "mine")
    lines = {line[:14].strip(): line[14:] for line in text.splitlines()}
    assert lines["checkpoint"] == str(_folder(run, 50))
    assert lines["step"] == "50 of 100"
    assert lines["saved"] == "2030-01-02T03:04:05 by attempt 0 of run r"
    assert lines["parameters"] == "27 in 2 tensors, and 1 name tied to one of them"
    assert lines["kept of each"] == "weight, exp_avg, exp_avg_sq: fp32, 12 bytes a parameter"
    assert lines["progress"] == "step=50 samples=400"
    assert lines["optim"] == "lr=0.1"
    assert lines["data"] == "abc"
    assert "in 2 files" in lines["size"]


def test_show_of_a_step_a_pointer_or_a_folder(run: RunDir, said: _Said) -> None:
    (run.checkpoints / "best").write_text("step-00000020\n")
    for argv in (["mine", "--step", "20"], ["mine", "--step", "best"], [str(_folder(run, 20))]):
        text = said("show", *argv)
        assert f"checkpoint    {_folder(run, 20)}\n" in text
        assert "pointers      best\n" in text
    assert f"checkpoint    {_folder(run, 20)}\n" in said("show", str(run.checkpoints / "best"))
    assert "--step 25: no such checkpoint" in (text := said("show", "mine", "--step", "25", code=2))
    assert "there are: 10, 20, 30, 40, 50; and pointers: best" in text
    assert json.loads(said("show", "mine", "--step", "20", "--json"))["step"] == 20


def test_show_of_a_damaged_one(run: RunDir, said: _Said) -> None:
    (_folder(run, 50) / "rank-00000.safetensors").write_bytes(b"")
    text = said("show", "mine")
    assert "state         damaged" in text
    assert text.splitlines()[-1].startswith(f"{_folder(run, 50)}/rank-00000.safetensors: has 0 bytes instead of")
    _flip(_folder(run, 50) / "manifest.json", 40)
    assert "manifest.json: " in said("show", "mine", code=2)


# --- verify


def test_verify(run: RunDir, said: _Said) -> None:
    lines = said("verify", "mine").splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [[f"step-{step:08d}", "ok"] for step in (50, 40, 30, 20, 10)]
    assert all(line.endswith("GB/s") for line in lines)
    assert lines[5].startswith("5 of 5 whole; read ")


def test_what_is_removed_while_it_is_verified_is_no_damage(run: RunDir, said: _Said, monkeypatch) -> None:
    """As by the retention of a run that goes on, before or after a checkpoint was read."""
    real = verify.problems

    def look(folder: Path) -> list[str]:
        if folder == _folder(run, 10):
            shutil.rmtree(folder)
        found = real(folder)
        if folder == _folder(run, 20):
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(verify, "problems", look)
    lines = said("verify", "mine").splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[3:5]] == ["removed meanwhile"] * 2
    assert lines[5].startswith("3 of 3 whole; read ")


def test_verify_names_the_file(run: RunDir, said: _Said) -> None:
    _flip(_folder(run, 40) / "rank-00001.safetensors")
    (_folder(run, 20) / "more.txt").write_text("")
    lines = said("verify", "mine", code=2).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step-")] == ["ok", "damaged", "ok", "damaged", "ok"]
    assert f"  {_folder(run, 40)}/rank-00001.safetensors: its content differs" in "\n".join(lines)
    assert f"  {_folder(run, 20)}/more.txt: no file of this checkpoint" in lines
    assert lines[-1].startswith("3 of 5 whole")
    assert said("verify", "mine", "--step", "30").splitlines()[0].startswith("step-00000030  ok")
    assert said("verify", str(_folder(run, 40)), code=2).splitlines()[-1] == "it is not whole"


def test_verify_where_none_is_whole(run: RunDir, said: _Said) -> None:
    for folder in run.checkpoints.glob("step-*"):
        _flip(folder / "rank-00000.safetensors")
    assert said("verify", "mine", code=2).splitlines()[-1] == "none is whole"


# --- prune


def test_prune_by_the_runs_own_policy(run: RunDir, said: _Said) -> None:
    size = _bytes(run, 10) + _bytes(run, 30)
    lines = said("prune", "mine").splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["removed", str(_folder(run, step))] for step in (10, 30)]
    assert lines[-1] == f"2 gone, {size / 1e3:.2f} kB; 3 stay"
    assert _steps(run) == [20, 40, 50]  # the last two, and the best
    assert said("prune", "mine") == "0 gone, 0 B; 3 stay\n"


@pytest.mark.parametrize(("argv", "left"), [
    (["--keep-last", "1"], [20, 50]),
    (["--keep-last", "4"], [20, 30, 40, 50]),
    (["--keep-last", "1", "--keep-every", "15"], [20, 30, 50]),
])  # fmt: skip
def test_prune_as_typed(run: RunDir, said: _Said, argv: list[str], left: list[int]) -> None:
    would = said("prune", "mine", "--dry-run", *argv)
    assert _steps(run) == [10, 20, 30, 40, 50]
    done = said("prune", "mine", *argv)
    assert done == would.replace("would remove", "removed").replace("would go", "gone")
    assert _steps(run) == left


def test_prune_keeps_what_is_pointed_to_and_the_newest_that_is_whole(run: RunDir, said: _Said) -> None:
    (run.checkpoints / "latest").write_text("step-00000030\n")  # later ones were passed over
    (run.checkpoints / "paper").write_text("step-00000010\n")
    (_folder(run, 50) / "rank-00000.safetensors").write_bytes(b"")
    text = said("prune", "mine", "--keep-last", "1")
    assert f"damaged, left alone: {_folder(run, 50)}/rank-00000.safetensors: has 0 bytes" in text
    assert _steps(run) == [10, 20, 30, 40, 50]
    (run.checkpoints / "paper").unlink()
    said("prune", "mine", "--keep-last", "1")
    assert _steps(run) == [20, 30, 40, 50]
    assert (run.checkpoints / "latest").read_text() == "step-00000030\n"


def test_prune_reads_what_is_to_stay_before_anything_goes(run: RunDir, said: _Said) -> None:
    for step in (40, 50):
        _flip(_folder(run, step) / "rank-00000.safetensors")  # of the right size
    text = said("prune", "mine", "--keep-last", "1")
    for step in (40, 50):
        assert f"damaged, left alone: {_folder(run, step)}/rank-00000.safetensors: its content differs" in text
    assert _steps(run) == [20, 30, 40, 50]


def test_prune_reads_it_too_where_only_what_is_damaged_would_go(run: RunDir, said: _Said) -> None:
    for step in (10, 30):
        shutil.rmtree(_folder(run, step))
    (_folder(run, 20) / "rank-00000.safetensors").write_bytes(b"short")
    (run.checkpoints / "best").unlink(missing_ok=True)
    for step in (40, 50):
        _flip(_folder(run, step) / "rank-00000.safetensors")
    assert "0 gone" in said("prune", "mine", "--keep-last", "2")
    assert _steps(run) == [20, 40, 50]


def test_prune_takes_what_a_killed_save_left(run: RunDir, said: _Said) -> None:
    (run.checkpoints / ".tmp-elsewhere-1-abcd").mkdir()
    assert "elsewhere" not in said("prune", "mine", "--dry-run")
    assert f"removed {run.checkpoints}/.tmp-elsewhere-1-abcd, which a killed save left" in said("prune", "mine")
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_prune_of_a_running_run_is_refused(run: RunDir, said: _Said) -> None:
    with run.lock():
        assert f"in use by process {os.getpid()}" in said("prune", "mine", "--keep-last", "1", code=2)
        assert "would go" in said("prune", "mine", "--dry-run")
    assert _steps(run) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("argv", "config", "text"), [
    (["--keep-last", "0"], "{}", "--keep-last 0: must be at least 1"),
    (["--keep-every", "-1"], "{}", "--keep-every -1: must be at least 0"),
    ([], "{keep_last: many}", "config.yaml: checkpoint: cannot be used"),
    ([], "[", "config.yaml: not YAML"),
    ([], "3", "config.yaml: says nothing of checkpoint.keep_last"),
])  # fmt: skip
def test_prune_by_no_number(run: RunDir, said: _Said, argv: list[str], config: str, text: str) -> None:
    run.config.write_text(f"checkpoint: {config}\n")
    assert text in said("prune", "mine", *argv, code=2)
    assert _steps(run) == [10, 20, 30, 40, 50]


# --- save


class _Running:
    """Plays a run from the outside: holds the lock, and does as it is told."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.looks = 0
        """How often somebody looked for checkpoints."""
        self._end = threading.Event()
        self._held = threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._script: list[str] = []

    def does(self, *script: str) -> None:
        """`take` the trigger when it is there; `begin N` and `commit N` a save; be `seen` as it is then; `end`."""
        self._script = list(script)
        self._thread.start()
        assert self._held.wait(60)

    def _live(self) -> None:
        with self.run.lock():
            self._held.set()
            for word, _, step in (line.partition(" ") for line in self._script):
                if word == "take":
                    while not self.run.save_trigger.exists() and not self._end.is_set():
                        time.sleep(0.01)
                    self.run.save_trigger.unlink(missing_ok=True)
                elif word == "begin":
                    write(self.run.checkpoints / ".tmp-x", int(step), tensors({"w": (3,)})).rename(
                        self.run.checkpoints / f".tmp-{step}"
                    )
                elif word == "commit":
                    (self.run.checkpoints / f".tmp-{step}").rename(_folder(self.run, int(step)))
                elif word == "seen":
                    before = self.looks
                    while self.looks < before + 2 and not self._end.is_set():
                        time.sleep(0.01)
                elif word == "end":
                    return
            self._end.wait(300)

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()


@pytest.fixture
def running(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Running]:
    found = _Running(run)

    def committed(root: Path) -> list[Path]:
        found.looks += 1
        return verify.committed(root)

    monkeypatch.setattr(ckpt, "verify", SimpleNamespace(committed=committed))
    yield found
    found.stop()


def test_save(run: RunDir, running: _Running, said: _Said) -> None:
    running.does("take", "begin 51", "commit 51")
    assert said("save", "mine") == f"{_folder(run, 51)}\n"
    assert not run.save_trigger.exists()


def test_a_save_that_had_begun_is_not_the_one_that_is_asked_for(run: RunDir, running: _Running, said: _Said) -> None:
    write(run.checkpoints / ".tmp-x", 51, tensors({"w": (3,)})).rename(run.checkpoints / ".tmp-51")
    running.does("take", "commit 51", "seen", "begin 55", "commit 55")
    assert said("save", "mine") == f"{_folder(run, 55)}\n"


def test_a_run_that_went_back_saves_a_lower_step(run: RunDir, running: _Running, said: _Said) -> None:
    """It passed over what came after 20."""
    running.does("take", "begin 21", "commit 21")
    assert said("save", "mine") == f"{_folder(run, 21)}\n"


def test_a_run_that_ends_meanwhile(run: RunDir, running: _Running, said: _Said) -> None:
    write(run.checkpoints / ".tmp-x", 51, tensors({"w": (3,)})).rename(run.checkpoints / ".tmp-51")
    running.does("take", "commit 51", "end")
    assert said("save", "mine") == f"{_folder(run, 51)}\n"


def test_a_run_that_fails_while_it_is_waited_for(run: RunDir, running: _Running, said: _Said) -> None:
    run.write_outcome("storage", 0, message="the disk is full")
    running.does("take", "end")
    assert "ended without a further checkpoint (storage: the disk is full)" in said("save", "mine", code=3)


@pytest.mark.parametrize(
    ("script", "wait", "text"),
    [([], "0.3", "has not looked for it yet"), (["take"], "2", "took note, and has not finished")],
)
def test_a_save_that_does_not_come(
    run: RunDir, running: _Running, said: _Said, script: list[str], wait: str, text: str
) -> None:
    running.does(*script)
    assert f"no new checkpoint in time: the run {text}" in said("save", "mine", "--wait", wait, code=3)
    assert not run.save_trigger.exists()


def test_a_run_that_does_not_run(run: RunDir, said: _Said) -> None:
    text = said("save", "mine", code=2)
    assert "is not running, so there is nothing to save; `dtrain launch` with its run.name goes on with it" in text
    assert not run.save_trigger.exists()
    assert "--wait 0: must be more than 0" in said("save", "mine", "--wait", "0", code=2)


# --- diff


def _two(tmp_path: Path, change: Tensors | None = None, **told) -> tuple[str, str]:
    of = tensors(SHAPES)
    return (str(write(tmp_path / "a", 10, of, cuts=[3, 21])),
            str(write(tmp_path / "b", 10, change or tensors(SHAPES), cuts=[11], replicas=2, **told)))  # fmt: skip


def test_the_same_from_other_ranks(tmp_path: Path, said: _Said) -> None:
    lines = said("diff", *_two(tmp_path, made_by={"strategy": "other", "size": 4})).splitlines()
    assert lines[1].endswith("b/step-00000010  step 10, other x 4, -")
    assert lines[2:] == [f"{state}: bit-equal in 2 parameters" for state in ("weight", "exp_avg", "exp_avg_sq")]


def test_one_element(tmp_path: Path, said: _Said) -> None:
    change = tensors(SHAPES)
    change["embed"]["weight"][0, 0] = 3.0
    change["embed"]["weight"][2, 2] = 8.0
    before = float(tensors(SHAPES)["embed"]["weight"][2, 2])
    change["norm"]["weight"][6] += 0.5
    change["norm"]["exp_avg"][0] = -100.0
    lines = said("diff", *_two(tmp_path, change), "--top", "1", code=1).splitlines()
    assert lines[2] == "weight: differs in 2 of 2 parameters; the largest difference of an element:"
    assert lines[4].split() == ["embed", f"{8 - before:.3e}", f"{(8 - before) / 8:.3e}"]
    assert lines[5] == "  and 1 more; --top N lists more"
    assert lines[6].startswith("exp_avg: differs in 1 of 2 parameters, at most by ")
    assert lines[6].endswith("in norm")
    assert lines[7] == "exp_avg_sq: bit-equal in 2 parameters"


@pytest.mark.parametrize(
    ("was", "now", "absolute"), [(0.0, -0.0, "0.000e+00"), (1.0, float("nan"), "nan"), (1.0, float("inf"), "inf")]
)
def test_what_is_hard_to_compare(tmp_path: Path, said: _Said, was: float, now: float, absolute: str) -> None:
    a, b = ({"norm": {"weight": torch.zeros(7)}} for _ in range(2))
    a["norm"]["weight"][3], b["norm"]["weight"][3] = was, now
    a["norm"]["weight"][5] = b["norm"]["weight"][5] = float("nan")
    folders = [str(write(tmp_path / name, 10, of)) for name, of in (("a", a), ("b", b))]
    row = said("diff", *folders, code=1).splitlines()[4].split()
    assert row[:2] == ["norm", absolute]
    assert said("diff", folders[1], folders[1])


def test_what_the_manifests_differ_in(tmp_path: Path, said: _Said) -> None:
    change = tensors({"embed": (4, 5), "norm": (8,), "more": (2,)}, states=["weight"])
    lines = said(
        "diff", *_two(tmp_path, change, identity={"optim.lr": 0.2, "data": "abc"}, counters={"updates": 9.0}), code=1
    )
    for part in ("identity: 1 of 2\n  optim.lr: was 0.1, is 0.2\n", "counters: 1 of 1\n  updates: 10.0 -> 9.0\n",
                 "parameters: 3 of 3\n", "  norm: weight, exp_avg, exp_avg_sq of shape (7,) -> weight of shape (8,)\n",
                 "  more: none -> weight of shape (2,)\n", "exp_avg: nothing to compare\n"):  # fmt: skip
        assert part in lines
    assert "progress" not in lines


def test_two_runs_by_their_newest_whole_ones(run: RunDir, said: _Said) -> None:
    (_folder(run, 50) / "manifest.json").unlink()
    text = said("diff", "mine", str(_folder(run, 40)))
    assert f"passed over {_folder(run, 50)}: " in text
    assert f"a  {_folder(run, 40)}  step 40" in text
    assert "--top -1: must be at least 0" in said("diff", "mine", "mine", "--top", "-1", code=2)


# --- all of them


def test_without_torch(run: RunDir) -> None:
    """All but the comparison of tensors, in an interpreter of its own."""
    code = f"""
import contextlib, io, sys
from dtrain.cli import run
for argv, code in ((["ls"], 0), (["ls", "--json"], 0), (["show"], 0), (["verify"], 0), (["save"], 2), (["prune"], 0)):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        assert run(["ckpt", argv[0], "mine", *argv[1:]]) == code, said.getvalue()
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=run.path.parents[1],
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert _steps(run) == [20, 40, 50]


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "save", "prune", "diff"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dtrain(["ckpt", verb, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a run's folder, or its name in runs/" in out
    assert dtrain(["ckpt", verb, "--nonsense", "x", "y"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
