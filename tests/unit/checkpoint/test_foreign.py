"""Foreign checkpoints: what is refused, and that nothing of one is run. Real ones of many ranks: tests/ranks."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dtrain.checkpoint import manifest
from dtrain.checkpoint.foreign import open_source, write
from dtrain.checkpoint.resume import Start, choose
from dtrain.checkpoint.storage import Reader
from dtrain.cli import run
from dtrain.errors import CheckpointError
from dtrain.plan.propose import configure
from dtrain.runs import RunDir

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b": ()}


def _state(**more: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    model = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    state = {name: {"step": torch.tensor(5.0), "exp_avg": torch.randn(shape, generator=draw),
                    "exp_avg_sq": torch.rand(shape, generator=draw)} for name, shape in SHAPES.items()}  # fmt: skip
    return {
        "model": {**model, "buffer": torch.ones(2)},
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]},
        **more,
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "source"
    _save(folder, _state())
    return folder


@pytest.fixture
def source(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "source"))


def _save(folder: Path, state: dict[str, Any]) -> Path:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def _universal(folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES, *, prefix: str = "", flat: bool = False,
               **said: Any) -> Path:  # fmt: skip
    """As ds_to_universal leaves it; the real one is in tests/ranks."""
    for name, shape in shapes.items():
        (folder / "zero" / f"{prefix}{name}").mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            tensor = torch.full(shape, float(len(name) + len(state)))
            torch.save(
                tensor.view(-1) if flat else {"param": tensor, "cat_dim": 0},
                folder / "zero" / f"{prefix}{name}" / f"{state}.pt",
            )
    fields = {"param_shapes": [{f"{prefix}{name}": torch.Size(shape) for name, shape in shapes.items()}], "global_steps": 7,
              "skipped_steps": 2, "mp_world_size": 1, "shared_params": {f"{prefix}c": f"{prefix}b"}, **said}  # fmt: skip
    torch.save(fields, folder / "mp_rank_00_model_states.pt")
    return folder


def test_torch_checkpoint(source: Path, tmp_path: Path) -> None:
    found = open_source(source)
    assert (found.shapes, found.states, found.updates) == (SHAPES, ("exp_avg", "exp_avg_sq"), 5)
    assert found.left_out == ("buffer",)
    write(found, tmp_path / "to", step=9, samples=72)
    read, state = manifest.read(tmp_path / "to"), _state()
    assert (read.step, read.progress, read.counters) == (9, {"step": 9, "samples": 72}, {"updates": 5})
    reader = Reader(tmp_path / "to", read)
    for name, shape in SHAPES.items():
        expected = {"weight": state["model"][name], **state["optimizer"]["state"][name]}
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            out = torch.empty(shape)
            reader.read_into(name, kind, 0, out.view(-1))
            assert torch.equal(out, expected[kind]), (name, kind)


def test_files_are_divided(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.checkpoint.foreign.FILE_BYTES", 50)
    made = write(open_source(source), tmp_path / "to", step=5, samples=0)
    # Three tensors of 48 bytes, each by itself; then three of 12 and three of 4, which are 48 together.
    assert len(made.files) == 4
    Reader(tmp_path / "to", manifest.read(tmp_path / "to")).close()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_universal_checkpoint(tmp_path: Path, prefix: str, flat: bool) -> None:
    found = open_source(_universal(tmp_path / "uni", prefix=prefix, flat=flat))
    assert (found.shapes, found.updates, found.tied) == (SHAPES, 5, {"c": "b"})  # 7 steps, 2 of them skipped
    made = write(found, tmp_path / "to", step=7, samples=0)
    reader = Reader(tmp_path / "to", made)
    out = torch.empty(12)
    reader.read_into("a.weight", "exp_avg", 0, out)
    assert torch.equal(out, torch.full((12,), 15.0))  # 8 + 7, the lengths of the names


class _Canary:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Canary(tmp_path / "sang")))
    assert (tmp_path / "sang").is_dir()


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_index_runs_nothing(source: Path, tmp_path: Path, protocol: int) -> None:
    whole = pickle.loads((source / ".metadata").read_bytes())
    whole.planner_data = _Canary(tmp_path / "sang")
    (source / ".metadata").write_bytes(pickle.dumps(whole, protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata: not read: it names posix\.mkdir, which is no part"):
        open_source(source)
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "os.system", "torch.load", "torch.Tensor", "torch.hub",
                                  "pathlib.Path", "torch.serialization.load", "importlib.import_module"])  # fmt: skip
def test_an_index_names_nothing_else(source: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (source / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match=f"it names {name}"):
        open_source(source)


def test_a_tensor_file_runs_nothing(tmp_path: Path) -> None:
    folder = _universal(tmp_path / "uni")
    torch.save({"param": _Canary(tmp_path / "sang")}, folder / "zero" / "a.bias" / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt: not read: .*posix\.mkdir"):
        write(open_source(folder), tmp_path / "to", step=7, samples=0)
    torch.save({"param_shapes": _Canary(tmp_path / "sang")}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"model_states\.pt: not read: "):
        open_source(folder)
    assert not (tmp_path / "sang").exists()
    assert not (tmp_path / "to").exists()


def test_a_piece_of_a_file_runs_nothing(source: Path, tmp_path: Path) -> None:
    [data] = source.glob("*.distcp")
    index = pickle.loads((source / ".metadata").read_bytes())
    torch.save(_Canary(tmp_path / "sang"), tmp_path / "piece")
    raw = (tmp_path / "piece").read_bytes()
    for info in index.storage_data.values():
        info.offset, info.length = 0, len(raw)
    data.write_bytes(raw)
    (source / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.distcp: not read: .*posix\.mkdir"):
        open_source(source)
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("file", ["../other", "/etc/hostname", "sub/file", "..", ""])
def test_no_file_outside_is_read(source: Path, file: str) -> None:
    index = pickle.loads((source / ".metadata").read_bytes())
    info = next(info for key, info in index.storage_data.items() if key.fqn == "model.b")
    info.relative_path = file
    (source / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="a part of it lies outside"):
        open_source(source)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state["optimizer"]["state"]["b"].pop("exp_avg_sq"), "b has the optimizer state exp_avg, and"),
    (lambda state: state["optimizer"]["state"]["b"].update(step=torch.tensor(6.0)), "were updated 5 to 6 times"),
    (lambda state: state["model"].pop("b"), "no weights for the optimizer state of b"),
    (lambda state: state.pop("optimizer"), "no optimizer state by the names of parameters"),
    (lambda state: state.update(ema=dict(state["model"])), "more than once, under 'ema.', 'model.'"),
    (lambda state: state["model"].update(b=state["model"]["b"].bfloat16()), "torch.bfloat16 instead of fp32"),
    (lambda state: state["model"].update(b=torch.ones(2)), r"of shape \(\) instead of \(2,\)"),
])  # fmt: skip
def test_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    state = _state()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        write(open_source(_save(tmp_path / "source", state)), tmp_path / "to", step=1, samples=0)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(("said", "message"), [
    ({"mp_world_size": 2}, "mp_world_size=2"),
    ({"checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1}}, "pp_degree=2"),
    ({"param_shapes": None}, "not as its tool writes it"),
    ({"param_shapes": [{name: torch.Size((2, *shape)) for name, shape in SHAPES.items()}]}, "instead of"),
])  # fmt: skip
def test_refused_universal(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(open_source(_universal(tmp_path / "uni", **said)), tmp_path / "to", step=1, samples=0)
    assert not (tmp_path / "to").exists()


def test_what_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no universal checkpoint of DeepSpeed"):
        open_source(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="python -m deepspeed.checkpoint.ds_to_universal"):
        open_source(tmp_path)


def test_damage_is_told(source: Path, tmp_path: Path) -> None:
    [data] = source.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"\.distcp: not read: it ends before byte"):
        write(open_source(source), tmp_path / "to", step=1, samples=0)
    (source / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(CheckpointError, match=r"\.metadata: not read"):
        open_source(source)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_FAIL", "ckpt.mid:full:after=3")
    with pytest.raises(CheckpointError, match=r"to: cannot be written \(No space left on device\)"):
        write(open_source(source), tmp_path / "to", step=1, samples=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = str(tmp_path / "to")
    argv = ["ckpt", "import", str(source), "--to", to]
    assert run(argv) == 2
    assert "--samples" in capsys.readouterr().err
    assert run([*argv, "--samples", "-1"]) == 2
    assert "--samples -1: must be at least 0" in capsys.readouterr().err
    assert run([*argv, "--samples", "40"]) == 0
    out = capsys.readouterr().out
    assert "3 parameters of 16 elements, with exp_avg, exp_avg_sq after 5 updates" in out
    assert "left out, without optimizer state: buffer" in out
    assert f"resume={to}" in out
    assert run([*argv, "--samples", "40"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(["ckpt", "show", to]) == 0
    out = capsys.readouterr().out
    assert f"from {source} (torch.distributed.checkpoint)" in out
    assert "not known: nothing is compared" in out
    assert run(["ckpt", "verify", to]) == 0
    (tmp_path / "notes").write_text("what lies beside it is no pointer")
    assert run(["ckpt", "ls", to]) == 0
    out = capsys.readouterr().out
    assert "imported" in out
    assert "no pointer" not in out


def test_a_run_starts_from_it_and_hears_what_is_not_known(source: Path, tmp_path: Path) -> None:
    write(open_source(source), tmp_path / "to", step=5, samples=40)
    said: list[str] = []
    config = configure(["schedule=constant", "train.steps=100", f"resume={tmp_path / 'to'}"], None)[0]
    start = choose(RunDir(tmp_path / "runs" / "r"), config, {"optim.lr": 0.1, "data": "abc"}, said.append)
    assert start == Start((tmp_path / "to",), 5)
    assert any(f"imported from {source}: how that was made is not known" in line for line in said)


def test_a_source_that_counts_nothing_needs_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = _state()
    for one in state["optimizer"]["state"].values():
        del one["step"]
    argv = ["ckpt", "import", str(_save(tmp_path / "source", state)), "--to", str(tmp_path / "to"), "--samples", "0"]
    assert run(argv) == 2
    assert "give --step N" in capsys.readouterr().err
    assert run([*argv, "--step", "12"]) == 0
    made = manifest.read(tmp_path / "to")
    assert (made.step, made.counters) == (12, {"updates": 12})
