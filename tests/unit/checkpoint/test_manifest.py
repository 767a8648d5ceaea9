"""What is written is what is read; whatever else stands in the file is refused, each thing with its own words."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import File, folder_name, step_of
from dtrain.errors import CheckpointError
from tests.unit.checkpoint.synthetic import describe, tensors

WHOLE = dataclasses.replace(
    describe(tensors({"a.weight": (2, 3), "b": (4,)}), 12, tied={"head": "a.weight"}, metrics={"loss": 0.1 + 0.2, "x": None},
             identity={"optim.betas": [0.9, 0.95], "name": "für \"alle\"\n", "none": None, "n": 2**60}),
    files={"rank-00000.safetensors": File(1234, "00ff00ff00ff00ff")},
)  # fmt: skip


def _sealed(fields: dict[str, Any]) -> bytes:
    """With the digest that fits, as nobody but a faulty dtrain would write it."""
    raw = json.dumps(fields, indent=1).removesuffix("\n}").encode() + b",\n"
    return raw + f' "xxh3": "{xxhash.xxh3_64_hexdigest(raw)}"\n}}\n'.encode()


def _fields() -> dict[str, Any]:
    fields = json.loads(manifest.dump(WHOLE))
    del fields["xxh3"]
    return fields


def test_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest.dump(WHOLE))
    assert manifest.read(tmp_path) == WHOLE
    assert WHOLE.num_bytes == 1234
    (tmp_path / "manifest.json").write_bytes(_sealed(_fields()))
    assert manifest.read(tmp_path) == WHOLE


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(
        manifest.dump(dataclasses.replace(WHOLE, metrics={"loss": float("nan"), "eval_loss": 2.0}))
    )
    assert manifest.read(tmp_path).metrics == {"loss": None, "eval_loss": 2.0}


def test_any_byte_that_changes_is_found(tmp_path: Path) -> None:
    raw, path = manifest.dump(WHOLE), tmp_path / "manifest.json"
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match="manifest.json: "):
            manifest.read(tmp_path)
    for length in range(0, len(raw), 50):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="manifest.json: "):
            manifest.read(tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda fields: fields.update(format="other"), "not the manifest of a checkpoint"),
    (lambda fields: fields.pop("format"), "not the manifest of a checkpoint"),
    (lambda fields: fields.update(version=2), "version 2 of the format, this dtrain reads 1"),
    (lambda fields: fields.pop("step"), r"not whole \(step: "),
    (lambda fields: fields.update(step="12"), r"not whole \(step: "),
    (lambda fields: fields.update(step=-1), r"not whole \(step: "),
    (lambda fields: fields.update(files=[]), r"not whole \(files: "),
    (lambda fields: fields["files"].update(x={"bytes": 3}), r"not whole \(files\.x\.xxh3: "),
    (lambda fields: fields["files"].update(x={"bytes": -3, "xxh3": ""}), r"not whole \(files\.x\.bytes: "),
    (lambda fields: fields["parameters"].update(c=3), r"not whole \(parameters\.c: "),
    (lambda fields: fields["parameters"]["b"].update(shape=[1.5]), r"not whole \(parameters\.b\.shape\.0: "),
    (lambda fields: fields["parameters"]["b"].pop("export"), r"not whole \(parameters\.b\.export: "),
    (lambda fields: fields["metrics"].update(loss="low"), r"not whole \(metrics\.loss: "),
    (lambda fields: fields.update(counters={}), r"not whole \(counters\.updates: missing"),
    (lambda fields: fields["counters"].update(updates=-1), r"not whole \(counters\.updates: "),
    (lambda fields: fields["files"].update({"../x": {"bytes": 3, "xxh3": ""}}), r"names '\.\./x', which is no file of this folder"),
    (lambda fields: fields["files"].update({"a/b": {"bytes": 3, "xxh3": ""}}), r"names 'a/b', which is no file"),
    (lambda fields: fields["files"].update({".x": {"bytes": 3, "xxh3": ""}}), r"names '\.x', which is no file"),
    (lambda fields: fields["files"].update({"": {"bytes": 3, "xxh3": ""}}), "names '', which is no file"),
])  # fmt: skip
def test_what_it_must_say(tmp_path: Path, change: Callable[[dict], Any], said: str) -> None:
    fields = _fields()
    change(fields)
    (tmp_path / "manifest.json").write_bytes(_sealed(fields))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/manifest\.json: {said}"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "cannot be read"), (b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[" * 10**5, "cannot be read"),
    (b'{"step": NaN}', "cannot be read"), (b"[]", "not the manifest"), (b"3", "not the manifest"), (b"{}", "not the manifest"),
    (b'{"format": "dtrain-checkpoint", "version": 1}', r"was changed after it was written \(its digest differs\)"),
])  # fmt: skip
def test_what_is_no_manifest(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {said}"):
        manifest.read(tmp_path)


def test_an_edited_one(tmp_path: Path) -> None:
    raw = manifest.dump(WHOLE).replace(b'"step": 12', b'"step": 13')
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        manifest.read(tmp_path)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing, so this is no complete checkpoint"):
        manifest.read(tmp_path)
    (tmp_path / "real").write_bytes(manifest.dump(WHOLE))
    (tmp_path / "manifest.json").symlink_to("real")
    with pytest.raises(CheckpointError, match="a link, so this is no checkpoint"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")  # to open it would wait for ever
    with pytest.raises(CheckpointError, match="no file, so this is no checkpoint"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_bytes(b"x" * 2000)
    monkeypatch.setattr(manifest, "LARGEST_BYTES", 1999)
    with pytest.raises(CheckpointError, match="2,000 bytes, no manifest is as large"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(("name", "step"), [
    ("step-00000012", 12), ("step-123456789", 123456789), ("step-012345678", None), ("step-12", None), ("step-0000001x", None),
    ("step-00000012.bak", None), (".tmp-step-00000012", None), ("latest", None), ("step-٠٠٠٠٠٠١٢", None),
])  # fmt: skip
def test_folders_by_name(name: str, step: int | None) -> None:
    assert step_of(Path("x") / name) == step
    if step is not None:
        assert folder_name(step) == name
