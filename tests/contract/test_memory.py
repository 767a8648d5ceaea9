"""Where state is divided, no rank holds a whole model while it is built and loaded."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest

from tests.contract.small import Recipe, make_built, overrides
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def large(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a model of some 200 MB in many files, and its bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = Qwen2Config(
        vocab_size=97, hidden_size=512, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=1536, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder / "model", max_shard_size="20MB")
    for name in ("train.arrow", "eval.arrow"):
        (folder / name).symlink_to(small / name)
    return folder, sum(p.numel() * 4 for p in model.parameters())


def _peak(folder: Path, typed: list[str]) -> tuple[int, int]:
    """Most bytes of its own memory that building took, and those that stay."""
    import dtrain.engine.build  # noqa: F401  imports are not what is measured

    # Give freed tensors back at once, or what the allocator keeps for later hides what is held.
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 65536)

    before, peak, done = _own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    built = make_built(folder, typed)
    peak[0] = max(peak[0], _own_bytes())
    done.set()
    watcher.join()
    assert built is not None
    return peak[0] - before, _own_bytes() - before


def _own_bytes() -> int:
    """Anonymous memory: files that are mapped to be read do not count."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
@pytest.mark.parametrize(
    "options",
    [("strategy=fsdp2",), ("strategy=zero3", "strategy.param_persistence_threshold=0"),
     ("strategy=zero3", "strategy.param_persistence_threshold=0", "train.precision=bf16")],
    ids=["fsdp2", "zero3", "zero3-bf16"],
)  # fmt: skip
def test_no_rank_holds_a_whole_model(large: tuple[Path, int], options: tuple[str, ...]) -> None:
    # On 8 ranks an eighth of the weights each; ZeRO-3 makes an eighth each of masters, gradients and a flat copy too.
    folder, num_bytes = large
    small_buckets = [f"strategy.{key}=1000000" for key in ("reduce_bucket_size", "prefetch_bucket_size")]
    typed = overrides(folder, Recipe(8), *options, *(small_buckets if "zero3" in options[0] else []))
    for peak, _ in run_ranks(_peak, folder, typed, size=8):
        assert peak < 0.9 * num_bytes, f"{peak / 2**20:.0f} MiB of a model of {num_bytes / 2**20:.0f}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_the_measure_sees_a_whole_model(large: tuple[Path, int]) -> None:
    folder, num_bytes = large
    peak, _ = run_ranks(_peak, folder, overrides(folder, Recipe(8), "strategy=ddp"), size=1)[0]
    assert peak > 0.95 * num_bytes
