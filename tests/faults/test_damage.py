"""What happens to files of a checkpoint on a disk: all of it is found, and the run goes on from what is whole."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dtrain.checkpoint import manifest
from dtrain.checkpoint.verify import committed, problems, quick_problems
from dtrain.errors import CheckpointError
from dtrain.runs import RunDir
from tests.e2e.command import rows
from tests.faults.expect import assert_same_result, steps_of
from tests.faults.harness import Fault, launch
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

STEPS = 8
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")


@pytest.fixture(scope="module")
def cut(folder: Path) -> RunDir:
    """A run that was killed when it had three checkpoints or more."""
    run = RunDir(folder / "runs" / "cut")
    typed = [f"train.steps={STEPS}", "checkpoint.async=false", "checkpoint.keep_last=9"]
    ended = launch(folder, run.name, *typed, fault=Fault(fail="ckpt.stage:kill:after=5"))
    assert ended.code == 3, ended.said
    assert steps_of(run) == [5, 4, 3, 2, 1]
    return run


@pytest.fixture
def one(cut: RunDir, tmp_path: Path) -> Path:
    """A whole checkpoint to spoil."""
    return Path(shutil.copytree(committed(cut.checkpoints)[0], tmp_path / "step-00000005"))


@pytest.fixture
def again(cut: RunDir, request: pytest.FixtureRequest) -> RunDir:
    """A copy of the run, to go on with."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    shutil.copytree(cut.path, cut.path.parent / name)
    return RunDir(cut.path.parent / name)


def names(folder: Path, file: str) -> bool:
    """Whether the problems are of that file."""
    found = problems(folder)
    return bool(found) and all(problem.startswith(f"{folder / file}: ") for problem in found)


def test_a_changed_byte_is_found_wherever_it_is(one: Path) -> None:
    """At the first and last byte of each file, in its header and data, and at random: 64 places and more."""
    seed = random.SystemRandom().randrange(2**32)
    draw, tried = random.Random(seed), 0
    for file in FILES:
        path = one / file
        raw = path.read_bytes()
        places = {0, 7, 8, 9, len(raw) // 2, len(raw) - 1, *(draw.randrange(len(raw)) for _ in range(18))}
        if file == "manifest.json":  # where a reader of JSON does not look: between two words
            places |= {raw.index(b"\n"), raw.rindex(b"\n"), raw.rindex(b'"'), raw.index(b": ") + 1}
        for place in places:
            for changed in (raw[place] ^ 1 << draw.randrange(8), 0x20 if raw[place] == 0x0A else 0x0A):
                path.write_bytes(raw[:place] + bytes([changed]) + raw[place + 1 :])
                assert changed == raw[place] or names(one, file), f"seed {seed}: {file} at {place}: {changed}"
                tried += changed != raw[place]
        path.write_bytes(raw)
    assert tried >= 64
    assert problems(one) == []


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "folder": lambda path: replaced(path, Path.mkdir),
    "pipe": lambda path: replaced(path, os.mkfifo),
    "link": lambda path: _linked(path),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"step": 5})),
}


def _linked(path: Path) -> None:
    """The same content, by another name."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_found(one: Path, damage: str, file: str) -> None:
    DAMAGES[damage](one / file)
    assert names(one, file)
    assert quick_problems(one) or damage in ("zeros",), "found before any rank is started"


def test_a_foreign_file_is_found(one: Path) -> None:
    (one / "optimizer.pt").write_bytes(b"x")
    assert names(one, "optimizer.pt")


def test_files_that_changed_places_are_found(one: Path) -> None:
    first, second = one / FILES[1], one / FILES[2]
    first.rename(one / "x")
    second.rename(first)
    (one / "x").rename(second)
    assert len(problems(one)) == 2


def test_a_checkpoint_under_another_name_is_found(one: Path) -> None:
    moved = one.rename(one.with_name("step-00000007"))
    assert names(moved, "manifest.json")
    assert "of step 5" in problems(moved)[0]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users may enter."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def _as_nobody(look: Callable[[Path], object], path: Path) -> str:
    """As another user where this one may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        return str(look(path))
    except CheckpointError as error:
        return str(error)


def test_what_may_not_be_read_is_found(one: Path, public: Path) -> None:
    spoilt = Path(shutil.copytree(one, public / one.name))
    for path in (spoilt, *spoilt.iterdir()):
        path.chmod(0o755)
    (spoilt / FILES[1]).chmod(0)
    assert run_ranks(_as_nobody, problems, spoilt, size=1) == [
        str([f"{spoilt / FILES[1]}: cannot be read (Permission denied)"])
    ]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(public: Path) -> None:
    """Else a run would begin anew for a moment's trouble of a disk."""
    root = public / "checkpoints"
    root.mkdir(mode=0)
    assert run_ranks(_as_nobody, committed, root, size=1) == [f"{root}: cannot be listed (Permission denied)"]
    root.rmdir()
    assert committed(root) == []
    root.write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        committed(root)


def _fields(one: Path) -> dict[str, Any]:
    return json.loads((one / "manifest.json").read_bytes())


def _written(one: Path, fields: Any) -> None:
    (one / "manifest.json").write_text(json.dumps(fields, indent=1) + "\n")


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing, but written anew": lambda fields: fields.update(tied=dict(fields["tied"]), x=fields.pop("xxh3")),
    "step": lambda fields: fields.update(step=6),
    "samples": lambda fields: fields["progress"].update(samples=24),
    "updates": lambda fields: fields["counters"].update(updates=6),
    "loss": lambda fields: fields["metrics"].update(loss=0.0),
    "not a number": lambda fields: fields["metrics"].update(loss=float("nan")),
    "seed": lambda fields: fields["identity"].update({"run.seed": 1}),
    "rate": lambda fields: fields["config"]["optim"].update(lr=1.0),
    "ranks": lambda fields: fields["made_by"].update(size=3),
    "digest of a file": lambda fields: fields["files"][FILES[1]].update(fields["files"][FILES[2]]),
    "a file less": lambda fields: fields["files"].pop(FILES[2]),
    "a parameter less": lambda fields: fields["parameters"].popitem(),
    "a key more": lambda fields: fields.update(a=1),
    "its own digest": lambda fields: fields.update(xxh3="0" * 16),
    "no digest": lambda fields: fields.pop("xxh3"),
    "version": lambda fields: fields.update(version=2),
    "format": lambda fields: fields.update(format="x"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_found(one: Path, edit: str) -> None:
    fields = _fields(one)
    EDITS[edit](fields)
    _written(one, fields)
    assert names(one, "manifest.json")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "{", "[" * 100_000, '{"format": "dtrain-checkpoint"}', "\0" * 99]
)
def test_a_manifest_that_is_none_is_found(one: Path, text: str) -> None:
    (one / "manifest.json").write_text(text)
    assert names(one, "manifest.json")


def test_a_huge_manifest_is_not_read(one: Path) -> None:
    os.truncate(one / "manifest.json", 2**40)  # sparse
    assert "no manifest is as large" in problems(one)[0]


def _forged(one: Path, **changed: Any) -> None:
    """As one who knows the format and writes the digest anew."""
    fields = {**_fields(one), **changed}
    del fields["xxh3"]
    raw = json.dumps(fields, indent=1, ensure_ascii=False).removesuffix("\n}").encode() + b",\n"
    (one / "manifest.json").write_bytes(raw + f' "xxh3": "{xxhash.xxh3_64_hexdigest(raw)}"\n}}\n'.encode())


def test_the_forger_knows_the_format(one: Path) -> None:
    _forged(one)
    assert problems(one) == []


FILE = {"bytes": 6, "xxh3": xxhash.xxh3_64_hexdigest(b"secret")}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "~/x", "a\\..\\b", "\0", "x\n",
                                  ".tmp-x"])  # fmt: skip
def test_no_file_elsewhere_is_read(one: Path, name: str) -> None:
    (one.parent / "secret").write_bytes(b"secret")
    _forged(one, files={**_fields(one)["files"], name: FILE})
    (problem,) = problems(one)
    assert problem.startswith(f"{one / 'manifest.json'}: names {name!r}, which is no file of this folder")
    with pytest.raises(CheckpointError):
        manifest.read(one)


@pytest.mark.parametrize("changed", [
    {"step": "5"}, {"step": -1}, {"step": None}, {"files": []}, {"files": {"a": {"bytes": "1", "xxh3": "x"}}},
    {"files": {"a": {"bytes": -1, "xxh3": "x"}}}, {"files": {"a": {"bytes": 1}}}, {"parameters": {"w": {"shape": "x"}}},
    {"parameters": {"w": {"shape": [-1], "states": [], "export": "w"}}}, {"parameters": None}, {"tied": 3},
    {"progress": "x"}, {"counters": {"updates": "x"}}, {"metrics": {"loss": "x"}}, {"identity": []}, {"made_by": 1},
])  # fmt: skip
def test_a_forged_manifest_of_other_types_is_refused(one: Path, changed: dict[str, Any]) -> None:
    _forged(one, **changed)
    (problem,) = problems(one)
    assert problem.startswith(f"{one / 'manifest.json'}: not whole (")
    assert next(iter(changed)) in problem


class _Canary:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.touched,)


def _loads(one: Path, canary: Path) -> list[str]:
    """What a load of everything in `one` asks of the interpreter that it should not."""
    from dtrain.checkpoint.storage import Reader

    heard: list[str] = []
    listening = []

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if listening and event.startswith(("pickle.", "exec", "compile", "os.system", "os.exec", "os.posix_spawn",
                                           "subprocess.", "import", "marshal.", "ctypes.")):  # fmt: skip
            heard.append(f"{event} {args}")

    def load(spoilt: Path) -> None:
        try:
            reader = Reader(spoilt, manifest.read(spoilt))
            for name, parameter in reader.manifest.parameters.items():
                for state in parameter.states:
                    import torch

                    reader.read_into(name, state, 0, torch.empty(torch.Size(parameter.shape).numel()))
            for file in FILES[1:]:
                reader.blobs(file)
            problems(spoilt)
        except CheckpointError:
            pass

    load(one)  # imports what it needs
    sys.addaudithook(hear)
    raw = pickle.dumps(_Canary(canary))
    listening.append(1)
    load(one)
    for file in (*FILES, "latest", "optimizer.pt", "config.yaml"):
        kept = (one / file).read_bytes() if (one / file).exists() else None
        (one / file).write_bytes(raw)
        load(one)
        if file in FILES[1:]:  # as if it had been written so
            _forged(
                one, files={**_fields(one)["files"], file: {"bytes": len(raw), "xxh3": xxhash.xxh3_64_hexdigest(raw)}}
            )
            load(one)
        if kept is not None:
            (one / file).write_bytes(kept)
    listening.clear()
    return heard


def test_nothing_of_a_forged_checkpoint_is_executed(one: Path, tmp_path: Path) -> None:
    assert run_ranks(_loads, one, tmp_path / "canary", size=1) == [[]]
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(_Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists(), "the canary is alive"


PASSED_OVER = {
    "half": lambda folder: os.truncate(folder / FILES[2], 1000),
    "missing": lambda folder: (folder / FILES[1]).unlink(),
    "no manifest": lambda folder: (folder / FILES[0]).unlink(),
    "edited": lambda folder: _written(folder, {**_fields(folder), "progress": {}}),
    "foreign": lambda folder: (folder / "x").touch(),
    "flipped": lambda folder: _flip(folder / FILES[2]),
}


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", PASSED_OVER)
def test_a_run_goes_on_from_the_newest_that_is_whole(
    folder: Path, again: RunDir, whole: Callable[[int], RunDir], damage: str
) -> None:
    PASSED_OVER[damage](again.checkpoints / "step-00000005")
    ended = launch(folder, again.name, f"train.steps={STEPS}")
    assert ended.code == 0, ended.said
    told = ended.out + "".join(event["line"] for event in rows(again.events) if event["kind"] == "passed over")
    assert f"resume: passed over {again.checkpoints / 'step-00000005'}: " in told
    began = [event["step"] for event in rows(again.events) if event["kind"] == "training"]
    assert began == [0, 4]
    assert steps_of(again)[0] == STEPS
    assert_same_result(again, whole(STEPS))


def test_where_none_is_whole_all_problems_are_told(folder: Path, again: RunDir) -> None:
    for checkpoint in committed(again.checkpoints):
        os.truncate(checkpoint / FILES[1], 10)
    ended = launch(folder, again.name, f"train.steps={STEPS}")
    assert ended.code == 2
    assert "none of its checkpoints is whole; restore one, or remove them to start from the beginning" in ended.err
    for step in range(1, 6):
        assert f"step-0000000{step}/{FILES[1]}: has 10 bytes instead of" in ended.err
    assert len(again.attempts()) == 1, "nothing was started"


def test_where_the_content_of_none_is_whole_all_problems_are_told(folder: Path, again: RunDir) -> None:
    for checkpoint in committed(again.checkpoints):
        _flip(checkpoint / FILES[1])
    ended = launch(folder, again.name, f"train.steps={STEPS}")
    assert ended.code == 2, ended.said
    assert "no checkpoint is what was written; restore one, or remove them" in ended.err
    for step in range(1, 6):
        assert f"step-0000000{step}/{FILES[1]}: its content differs from what was written" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("damage", "said"), [("half", "has 1,000 bytes instead of"), ("flipped", "its content differs"),
                                              ("no manifest", "missing, so this is no complete")])  # fmt: skip
def test_a_checkpoint_asked_for_by_name_is_not_replaced_by_another(
    folder: Path, again: RunDir, damage: str, said: str
) -> None:
    asked = again.checkpoints / "step-00000005"
    PASSED_OVER[damage](asked)
    ended = launch(folder, f"new-{again.name}", f"train.steps={STEPS}", f"resume={asked}")
    assert ended.code == 2, ended.said
    assert said in ended.err
    assert str(asked) in ended.err


POINTERS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "to nothing": lambda path: path.write_text("step-00000099\n"),
    "to an older one": lambda path: path.write_text("step-00000002\n"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "missing": lambda path: path.unlink(),
    "a link": lambda path: replaced(path, lambda path: path.symlink_to("step-00000003")),
    "a folder": lambda path: replaced(path, Path.mkdir),
}


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_pointer_decides_nothing(folder: Path, again: RunDir, whole: Callable[[int], RunDir], pointer: str) -> None:
    POINTERS[pointer](again.checkpoints / "latest")
    (again.checkpoints / "mine").symlink_to("step-00000002")
    ended = launch(folder, again.name, f"train.steps={STEPS}")
    assert ended.code == 0, ended.said
    assert f"going on from {again.checkpoints / 'step-00000005'}" in ended.out
    assert_same_result(again, whole(STEPS))
    there = steps_of(again)
    assert (there[0], there[-1]) == (8, 2 if pointer != "a folder" else 1), "a pointed one stays"
    told = [event["problem"] for event in rows(again.events) if event.get("problem")]
    if pointer == "a folder":  # every save is whole, and says what it could not do
        assert told
        assert "Is a directory" in told[0]
    else:
        assert told == []
        assert (again.checkpoints / "latest").read_text() == "step-00000008\n"


def test_changed_data_is_refused(folder: Path, again: RunDir) -> None:
    elsewhere = folder / "elsewhere.jsonl"
    elsewhere.write_bytes((folder / "texts.jsonl").read_bytes())
    typed = [f"train.steps={STEPS}", f"dataset.path={elsewhere}"]
    with elsewhere.open("a") as file:
        file.write('{"text": "one row more"}\n')
    ended = launch(folder, again.name, *typed)
    assert ended.code == 2
    assert "data: was " in ended.err
    assert "type 'resume.allow=[data" in ended.err
    assert len(again.attempts()) == 1, "nothing was started"
    allowed = launch(folder, again.name, *typed, "resume.allow=[data,tokenizer,model]")
    assert allowed.code == 0, allowed.said
    assert "resume: allowed: data: was " in allowed.out
    assert [row["step"] for row in rows(again.path / "metrics.jsonl")] == list(range(1, STEPS + 1))
