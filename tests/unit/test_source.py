"""Rules that the source itself must keep."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dtrain
from dtrain.config.compose import choices, conf_dir, load_yaml

SOURCE = Path(dtrain.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in FILES:
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_no_strategy_is_named_outside_its_folder() -> None:
    """A branch on a name would be the first of many."""
    names = set(choices()["strategy"]) - {"auto"}  # a word of many groups
    found = [f"{where}:{node.lineno}: {node.value!r}" for where, tree in _trees() if not where.startswith("strategies/")
             for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]  # fmt: skip
    assert names >= {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    assert found == []


BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "numpy.load", "np.load", "pandas.read_pickle", "hydra.utils.instantiate", "instantiate",
}  # fmt: skip
SAFE_LOADERS = {"dtrain/config/compose.py"}
REVIEWED = {
    "checkpoint/_pickled.py": {"imports pickle", "calls torch.load"},
}
"""What `dtrain ckpt import` reads foreign files with: an unpickler that knows a few names, and weights_only."""


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _banned(where: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [module, *(alias.name for alias in node.names)]:
                if name.split(".")[0] in BANNED_IMPORTS:
                    yield f"{where}:{node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            name = _name(node.func)
            if name in BANNED_CALLS:
                yield f"{where}:{node.lineno}: calls {name}"
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{where}:{node.lineno}: shell="
                if keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{where}:{node.lineno}: allow_pickle="
            if name == "yaml.load" and "Loader" not in {keyword.arg for keyword in node.keywords}:
                yield f"{where}:{node.lineno}: yaml.load without a loader"
            if name == "yaml.load" and f"dtrain/{where}" not in SAFE_LOADERS:
                yield f"{where}:{node.lineno}: yaml.load outside of the one place"
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("Loader", "FullLoader", "UnsafeLoader")
            and _name(node.value) == "yaml"
        ):
            yield f"{where}:{node.lineno}: yaml.{node.attr}"


def test_nothing_that_runs_data() -> None:
    found = [one for where, tree in _trees() for one in _banned(where, tree)]
    reviewed = [(where, what) for where, each in REVIEWED.items() for what in each]
    assert [
        one for one in found if not any(one.startswith(f"{w}:") and one.endswith(what) for w, what in reviewed)
    ] == []


def test_what_was_reviewed_is_restricted() -> None:
    for where, tree in _trees():
        if where not in REVIEWED:
            continue
        loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "torch.load"]
        safe = [{k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)} for call in loads]
        assert [one.get("weights_only") for one in safe] == [True] * 2
        used = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _name(node.value) == "pickle"
        }
        assert used == {"Unpickler", "UnpicklingError"}


@pytest.mark.parametrize("text", ["import pickle", "from pickle import loads", "torch.load(p)", "eval(x)", "os.system(x)",
                                  "subprocess.run(x, shell=True)", "yaml.load(x)", "yaml.load(x, Loader=yaml.UnsafeLoader)",
                                  "np.load(p, allow_pickle=True)"])  # fmt: skip
def test_the_ban_finds(text: str) -> None:
    assert list(_banned("x.py", ast.parse(text)))


HEAVY = ("torch", "deepspeed", "transformers", "numpy", "datasets", "wandb", "matplotlib", "pyarrow", "tokenizers")


def _imported(statement: str) -> list[str]:
    """Heavy packages that a statement brings in, in an interpreter of its own."""
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=SOURCE.parent)
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_every_target_without_torch() -> None:
    targets = {load_yaml(path).get("_target_") for path in conf_dir().glob("*/*.yaml")} - {None}
    modules = sorted({target.rsplit(".", 1)[0] for target in targets})
    assert len(modules) >= 15
    assert _imported("import " + ", ".join(modules)) == []


@pytest.mark.parametrize("argv", [["--help"], ["plan"], ["plan", "model=qwen7b", "device=cuda"], ["config", "show"], ["plan", "foo=1"],
                                  ["launch", "--dry-run"], ["launch", "--help"], ["runs", "ls", "/"]])  # fmt: skip
def test_verbs_without_torch(argv: list[str]) -> None:
    assert _imported(f"from dtrain.cli import run\nrun({argv!r})") == []


def test_every_file_of_a_strategy_has_its_paper_or_source() -> None:
    for path in conf_dir().glob("strategy/zero*.yaml"):
        assert "arXiv" in path.read_text(encoding="utf-8")
