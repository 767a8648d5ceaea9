"""One rank's part of a checkpoint: from live shards to a file, and from anybody's files to live shards."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import torch

from dtrain.checkpoint.boxes import Box, boxes, runs
from dtrain.checkpoint.manifest import File, Manifest, Parameter
from dtrain.checkpoint.safetensors import Entry, header, read_header
from dtrain.checkpoint.verify import CHUNK_BYTES, Digest
from dtrain.errors import CheckpointError
from dtrain.failpoints import reach
from dtrain.folders import begin_flush

if TYPE_CHECKING:
    from dtrain.strategies.base import Shard

WEIGHT = "weight"
ALIGN = 4096
"""Replicas divide a parameter at multiples of so many elements: a small one has a single writer."""
WRITE_BYTES = 1 << 24
"""Of one write, and of what the disk is given to do at once while the rest is still being written."""

READ_BYTES = 1 << 24
"""Of one read, so that a slow disk is seen to get on."""


class Part(NamedTuple):
    """What this rank writes of one state of one parameter: live elements [start, start + numel) of it."""

    name: str
    state: str
    shape: tuple[int, ...]
    start: int
    view: torch.Tensor


def parts(shards: Iterable[Shard], order: Mapping[str, int]) -> list[Part]:
    """What this rank writes, so that all ranks together write every element once. `order`: of parameters, by name."""
    found = []
    for shard in shards:
        begin, end = _share(shard, order[shard.name])
        if begin < end:
            found += [Part(shard.name, state, shard.shape, shard.start + begin, _own(view, begin, end, shard))
                      for state, view in shard.views.items()]  # fmt: skip
    return found


def _own(view: torch.Tensor, begin: int, end: int, shard: Shard) -> torch.Tensor:
    """Of what was copied off the weight's device for a moment, a piece must not keep the whole."""
    mine = view[begin:end]
    return mine.clone() if len(mine) < len(view) and view.device != shard.views[WEIGHT].device else mine


def _share(shard: Shard, index: int) -> tuple[int, int]:
    """The replica's range of the shard's own elements. Whose turn is first goes round, parameter by parameter."""
    numel, turn = shard.views[WEIGHT].numel(), (shard.replica + index) % shard.replicas
    each = -(-numel // (shard.replicas * ALIGN)) * ALIGN
    return min(turn * each, numel), min((turn + 1) * each, numel)


@final
class HostBuffer:
    """Memory of the host that a save copies the parts into; kept from save to save."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, of: Sequence[Part]) -> list[Part]:
        """The same parts as copies. Returns when the copies are made."""
        need = sum(part.view.numel() for part in of)
        on_gpu = any(part.view.is_cuda for part in of)
        if self._memory is None or self._memory.numel() < need:
            self._memory = None  # before the new one is made
            self._memory = torch.empty(need, dtype=torch.float32, pin_memory=on_gpu)
        at, copies = 0, []
        for part in of:
            copy = self._memory[at : at + part.view.numel()]
            copy.copy_(part.view, non_blocking=on_gpu)
            copies.append(part._replace(view=copy))
            at += part.view.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def copied_apart(of: Sequence[Part]) -> list[Part]:
    """The parts in host memory, by a stream of their own: it waits for nothing that is queued on the device."""
    if not any(part.view.is_cuda for part in of):
        return list(of)
    with torch.cuda.stream(torch.cuda.Stream()):
        return [part._replace(view=part.view.cpu()) for part in of]


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def key_of(name: str, state: str, offset: Sequence[int]) -> str:
    return f"{state}:{name}@{','.join(map(str, offset))}"


def _piece_of(key: str, entry: Entry, parameters: Mapping[str, Parameter]) -> tuple[str, str, Box] | None:
    """Parameter, state and place of what a file has under this key; None where it is no piece of any."""
    state, _, rest = key.partition(":")
    name, _, said = rest.rpartition("@")
    try:
        box = Box(tuple(int(at) for at in said.split(",") if at), entry.shape)
    except ValueError:
        return None
    parameter = parameters.get(name)
    if parameter is None or state not in parameter.states or entry.dtype != "F32":
        return None
    shape = parameter.shape
    within = len(box.offset) == len(box.sizes) == len(shape) and all(
        0 <= first <= first + size <= whole for first, size, whole in zip(*box, shape, strict=True)
    )
    return (name, state, box) if within else None


def write_file(path: Path, of: Sequence[Part], blobs: Mapping[str, bytes]) -> File:
    """The parts as boxes, and the blobs under their own names, in one safetensors file that is flushed to disk."""
    entries: dict[str, Entry] = {}
    for part in of:
        for box in boxes(part.shape, part.start, part.view.numel()):
            entries[key_of(part.name, part.state, box.offset)] = Entry("F32", box.sizes)
    entries |= {name: Entry("U8", (len(blob),)) for name, blob in blobs.items()}
    return write_chunks(path, _chunks(header(entries), of, blobs))


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> File:
    """One file of all of them, flushed to disk."""
    import xxhash

    state, num_bytes, handed = xxhash.xxh3_64(), 0, 0
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            state.update(chunk)
            left = memoryview(chunk)
            while left:
                left = left[file.write(left) or 0 :]
            num_bytes += len(chunk)
            if num_bytes - handed >= WRITE_BYTES:
                begin_flush(file.fileno(), handed, num_bytes - handed)
                handed = num_bytes
            reach("ckpt.mid")
        os.fsync(file.fileno())
    return File(num_bytes, state.hexdigest())


def _chunks(head: bytes, of: Sequence[Part], blobs: Mapping[str, bytes]) -> Iterator[bytes | memoryview]:
    """Everything in order, in large pieces: parts that lie side by side in memory are written together."""
    yield head
    for tensor in _joined(of):
        for at in range(0, tensor.numel(), WRITE_BYTES // 4):
            yield tensor[at : at + WRITE_BYTES // 4].cpu().contiguous().view(torch.uint8).numpy().data
    yield from blobs.values()


def _joined(of: Sequence[Part]) -> Iterator[torch.Tensor]:
    run: torch.Tensor | None = None
    for part in of:
        view = part.view.detach()
        after = run is not None and run.untyped_storage().data_ptr() == view.untyped_storage().data_ptr() and (
            run.storage_offset() + run.numel() == view.storage_offset())  # fmt: skip
        if run is not None and after:
            run = torch.as_strided(run, (run.numel() + view.numel(),), (1,), run.storage_offset())
            continue
        if run is not None:
            yield run
        run = view
    if run is not None:
        yield run


class _Run(NamedTuple):
    """Elements of one state of one parameter that lie together in a file."""

    start: int
    numel: int
    file: str
    at: int
    """Of the first byte."""


@final
class Reader:
    """Any flat range of any parameter, out of whichever files hold it.

    Reads no byte that is not asked for, but of the files that it is to prove: their digests are worked out on the way,
    so that what is asked for in the order of the file is read once.
    """

    def __init__(self, folder: Path, manifest: Manifest, prove: Iterable[str] = (),
                 took: Callable[[int], None] = lambda num_bytes: None) -> None:  # fmt: skip
        """Reads the headers of all files. `prove`: files whose content is to be compared with what was written, see
        `problems`. `took` hears of each piece that is read, from any thread, and what it raises ends that. Raises
        CheckpointError where they do not hold every parameter whole.
        """
        self.folder, self.manifest, self._took = folder, manifest, took
        self._digests = {file: Digest() for file in prove}
        self._files: dict[str, int] = {}
        self._runs: dict[tuple[str, str], list[_Run]] = {}
        self._blobs: dict[str, dict[str, tuple[int, int]]] = {}
        for file in manifest.files:
            self._index(file)
        for found in self._runs.values():
            found.sort()
        self._check_whole()

    def _index(self, file: str) -> None:
        blobs = self._blobs.setdefault(file, {})
        for key, (entry, at) in read_header(self.folder / file).items():
            if entry.dtype == "U8":
                blobs[key] = at, entry.num_bytes
                continue
            piece = _piece_of(key, entry, self.manifest.parameters)
            if piece is None:
                raise CheckpointError(f"{self.folder / file}: {key} is no part of a parameter of this checkpoint")
            name, state, box = piece
            for start, numel in runs(self.manifest.parameters[name].shape, box):
                self._runs.setdefault((name, state), []).append(_Run(start, numel, file, at))
                at += 4 * numel

    def _check_whole(self) -> None:
        for name, parameter in self.manifest.parameters.items():
            for state in parameter.states:
                end, numel = 0, math.prod(parameter.shape)
                for run in self._runs.get((name, state), []):
                    if run.start < end:
                        raise CheckpointError(f"{self.folder}: {state} of {name} is there twice from element "
                                              f"{run.start:,} on, in {run.file} and before")  # fmt: skip
                    if run.start > end:
                        break
                    end += run.numel
                if end != numel:
                    raise CheckpointError(f"{self.folder}: {state} of {name} is not whole: element {end:,} of its "
                                          f"{numel:,} is not there")  # fmt: skip

    def read_into(self, name: str, state: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D fp32 tensor `out`, on any device, with elements [start, start + out.numel())."""
        target = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty(out.shape)
        found = self._runs[name, state]
        at, end = start, start + out.numel()
        raw = target.detach().view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        first = bisect.bisect_right(found, start, key=lambda run: run.start) - 1
        for run in found[max(0, first) :]:
            if at == end:
                break
            count = min(end, run.start + run.numel) - at
            if count > 0:
                place = run.at + 4 * (at - run.start)
                self._read(run.file, place, raw[4 * (at - start) : 4 * (at - start + count)])
                at += count
        assert at == end, (name, state, start, end, at)
        if target is not out:
            out.copy_(target)

    def blobs(self, file: str) -> dict[str, bytes]:
        """What one rank wrote besides its parts; empty where there is no such file."""
        found = {}
        for name, (at, num_bytes) in self._blobs.get(file, {}).items():
            raw = bytearray(num_bytes)
            self._read(file, at, memoryview(raw))
            found[name] = bytes(raw)
        return found

    def problems(self) -> list[str]:
        """Of the files to prove, those whose content is not what was written. Reads what was not read of them yet."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return [problem for problem in pool.map(self._problem, self._digests) if problem]

    def _problem(self, file: str) -> str | None:
        said, path = self.manifest.files[file], self.folder / file
        try:
            self._digest_until(file, said.bytes)
            num_bytes = os.fstat(self._opened(file)).st_size
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        if num_bytes != said.bytes:
            return f"{path}: has {num_bytes:,} bytes instead of {said.bytes:,}"
        return self._digests[file].problem(path, said)

    def _digest_until(self, file: str, end: int) -> None:
        """Read what comes before byte `end` and was not read yet, for its digest alone."""
        digest = self._digests[file]
        if digest.end < end:
            room = memoryview(bytearray(min(CHUNK_BYTES, end - digest.end)))
            while digest.end < end:
                self._read(file, digest.end, room[: end - digest.end])

    def _read(self, file: str, at: int, into: memoryview) -> None:
        digest, handle = self._digests.get(file), self._opened(file)
        if digest is not None:
            self._digest_until(file, at)
        piece = READ_BYTES if digest is None else CHUNK_BYTES
        while into:
            try:
                count = os.preadv(handle, [into[:piece]], at)
            except OSError as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error.strerror})") from None
            if count <= 0:
                raise CheckpointError(f"{self.folder / file}: ended while it was read")
            if digest is not None:
                digest.take(at, into[:count])
            self._took(count)
            at, into = at + count, into[count:]

    def _opened(self, file: str) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:  # removed by the run that it is of, perhaps
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error.strerror})") from None
        return self._files[file]

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
