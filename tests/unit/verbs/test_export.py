"""What `dtrain export` makes of checkpoints and of other exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtrain.checkpoint.manifest import Parameter
from dtrain.cli import run as dtrain
from dtrain.runs import RunDir
from dtrain.runs.files import write_json
from tests.unit.checkpoint.synthetic import Tensors, describe, tensors, write

SHAPES = {"embed": (50, 4), "norm": (4,), "out": (3, 5, 2)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Called `mine`: two checkpoints, whose weights are named otherwise in an export, and no export of its own."""
    monkeypatch.chdir(tmp_path)
    found = RunDir(tmp_path / "runs" / "mine")
    _assets(found.model)
    found.config.write_text("")
    for step in (10, 20):
        of = tensors(SHAPES, seed=step)
        told = {
            name: Parameter(one.shape, one.states, f"model.{name}")
            for name, one in describe(of, step).parameters.items()
        }
        write(found.checkpoints, step, of, cuts=[60, 100], parameters=told, tied={"head": "embed"},
              config={"export": {"dtype": "bf16"}})  # fmt: skip
    return found


def _assets(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "x", "torch_dtype": "float64", "dtype": "float64"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")


def _ok(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Path, str]:
    """The folder that it made, and all that was said."""
    assert dtrain(["export", *argv]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    return Path(out.splitlines()[-1].removeprefix("exported to ")), out


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert dtrain(["export", *argv]) == 2
    return capsys.readouterr().err


def _weights(step: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {f"model.{name}": states["weight"].to(dtype) for name, states in tensors(SHAPES, seed=step).items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_the_newest_whole_one_as_the_run_would(run: RunDir, capsys) -> None:
    to, out = _ok(capsys, "mine")
    assert to == run.path / "exports" / "step-00000020-bf16"
    assert f"exporting {run.checkpoints}/step-00000020 in bf16\n" in out
    assert _same(load_file(to / "model.safetensors"), _weights(20))
    assert sorted(path.name for path in to.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((to / "config.json").read_text()) == {"model_type": "x", "dtype": "bfloat16"}
    assert _refused(capsys, "mine") == f"error: {to}: is there already; name another folder with --to\n"


def test_a_step_in_some_precision_to_some_place(run: RunDir, capsys, tmp_path: Path) -> None:
    (run.checkpoints / "best").write_text("step-00000010\n")
    for i, argv in enumerate(
        (["mine", "--step", "10"], ["mine", "--step", "best"], [str(run.checkpoints / "step-00000010")])
    ):
        to, _ = _ok(capsys, *argv, "--dtype", "fp32", "--to", str(tmp_path / "some" / f"place{i}"))
        assert _same(load_file(to / "model.safetensors"), _weights(10, torch.float32))
        assert json.loads((to / "config.json").read_text())["dtype"] == "float32"


def test_what_is_damaged_is_passed_over_aloud(run: RunDir, capsys) -> None:
    path = run.checkpoints / "step-00000020" / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    to, out = _ok(capsys, "mine")
    assert to.name == "step-00000010-bf16"
    assert f"passed over {path.parent}: {path}: its content differs" in out
    assert f"  {path}: its content differs" in _refused(capsys, "mine", "--step", "20")
    (run.checkpoints / "step-00000010" / "manifest.json").unlink()
    text = _refused(capsys, "mine", "--to", "x")
    assert f"{run.checkpoints}: not whole:" in text
    assert "step-00000010/manifest.json: missing" in text
    assert not Path("x").exists()


def test_files_of_a_size(run: RunDir, capsys) -> None:
    """In bf16 the embedding is 400 bytes, the norm 8, the rest 60: with at most 70 in a file, two files."""
    to, _ = _ok(capsys, "mine", "--max-shard-size", "0.07kB")
    index = json.loads((to / "model.safetensors.index.json").read_text())
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert index == {"metadata": {"total_size": 468},
                     "weight_map": {"model.embed": names[0], "model.norm": names[1], "model.out": names[1]}}  # fmt: skip
    assert _same({**load_file(to / names[0]), **load_file(to / names[1])}, _weights(20))
    again, _ = _ok(capsys, str(to), "--to", "one", "--max-shard-size", "1GiB")
    assert _same(load_file(again / "model.safetensors"), _weights(20))
    assert not (again / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("text", ["0", "0GB", "-1GB", "5 apples", "GB", "1e9", ""])
def test_what_is_no_size(run: RunDir, capsys, text: str) -> None:
    assert "no size; write it as 500MB or 5GB" in _refused(capsys, "mine", f"--max-shard-size={text}")


def test_a_run_without_checkpoints_gives_its_own_export(run: RunDir, capsys, tmp_path: Path) -> None:
    run.checkpoints.rename(tmp_path / "away")
    assert "has neither a checkpoint nor an export of its own yet" in _refused(capsys, "mine")
    _assets(run.export)
    (run.export / "config.json").write_text('{"dtype": "float16"}')
    save_file(_weights(10, torch.float16), run.export / "model.safetensors", metadata={"format": "pt"})
    to, _ = _ok(capsys, "mine")
    assert to == run.path / "exports" / "export-fp16"
    assert _same(load_file(to / "model.safetensors"), _weights(10, torch.float16))
    to, _ = _ok(capsys, str(run.export), "--dtype", "fp32", "--to", "wide")
    assert _same(
        load_file(to / "model.safetensors"), {name: one.float() for name, one in _weights(10, torch.float16).items()}
    )
    assert "no checkpoints; checkpoint.every_steps" in _refused(capsys, "mine", "--step", "20")


def test_what_is_no_source(run: RunDir, capsys, tmp_path: Path) -> None:
    assert "none: no run of that name or folder" in _refused(capsys, "none")
    _assets(tmp_path / "odd")
    save_file({"x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "odd" / "model.safetensors")
    assert "x is of I64, which is none of F32, BF16, F16" in _refused(capsys, "odd", "--dtype", "bf16")
    (run.model / "config.json").unlink()
    text = _refused(capsys, "mine")
    assert f"{run.model}: not there, and a checkpoint lacks the model's config and tokenizer" in text
    assert not (run.path / "exports").exists()


@pytest.mark.parametrize(("function", "said"), [
    ("imported:make", "imported is imported only where it is allowed; if it is a package of your own, type --plugin imp"),
    ("imported", "model.function=imported: not module:function"),
])  # fmt: skip
def test_a_run_has_no_package_imported_that_nobody_allowed(
    run: RunDir, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str, said: str
) -> None:
    (tmp_path / "imported.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    run.config.write_text(json.dumps({
        "model": {"_target_": "dtrain.models.python.Python", "function": function},
        "tuning": {"_target_": "dtrain.tuning.freeze.Freeze", "last_layers": 1}, "run": {"seed": 0},
    }))  # fmt: skip
    write_json(run.manifest, {"data": {"assets": str(run.model), "dir": str(tmp_path)}})
    write(run.checkpoints, 30, tensors(SHAPES, seed=30), base={"path": "x", "adapter": False})
    assert said in _refused(capsys, "mine")
    assert not (tmp_path / "ran").exists()


def test_what_fp16_cannot_hold(run: RunDir, capsys) -> None:
    of = tensors({"w": (4,)})
    of["w"]["weight"][2] = 7e4
    write(run.checkpoints, 30, of)
    assert "w: has elements beyond 65,504, the largest of fp16" in _refused(capsys, "mine", "--dtype", "fp16")
    assert list((run.path / "exports").iterdir()) == []
    _ok(capsys, "mine", "--dtype", "bf16")


def test_what_is_there_stays(run: RunDir, capsys, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "--to there: is there already; name a new folder" in _refused(capsys, "mine", "--to", "there")
    assert list((tmp_path / "there").iterdir()) == []


# --- memory

LARGEST = 2**20
"""Elements of each tensor: 4 MiB."""
_PEAKS = """
import resource, sys
from dtrain.cli import run
for name in sys.argv[1:]:
    assert run(["export", name, "--dtype", "bf16", "--to", name + "-out"]) == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _large(path: Path, num: int) -> int:
    """A run whose checkpoint has so many tensors; its size in KiB."""
    run = RunDir(path)
    _assets(run.model)
    run.config.write_text("")
    whole = torch.randn(LARGEST)
    of: Tensors = {f"w{i}": {"weight": whole.view(1024, 1024)} for i in range(num)}
    folder = write(run.checkpoints, 1, of, cuts=[num * LARGEST // 3])
    return sum(file.stat().st_size for file in folder.iterdir()) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_is_of_the_largest_tensor_not_of_the_model(tmp_path: Path) -> None:
    """Ten times the model, from a checkpoint and from an export, takes what the first did. The allocator keeps a little
    more of what it once had: three tensors are allowed, of the 45 that the larger one has more.
    """
    small, large = _large(tmp_path / "small", 5), _large(tmp_path / "large", 50)
    done = subprocess.run([sys.executable, "-c", _PEAKS, "small", "large", "small-out", "large-out"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *others = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert large - small > 40 * 4096
    assert max(others) - first <= 3 * 4096, (first, others)
