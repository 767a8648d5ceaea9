"""What an objective may ask for when training begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dtrain.config import frozen
from dtrain.engine.loaded import whole
from dtrain.models.base import DTYPES, Setting
from dtrain.objectives.base import Around
from dtrain.plan.batch import BatchPlan

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.config.schema import Config
    from dtrain.data.store import AbstractStore
    from dtrain.data.streaming import Streams
    from dtrain.models.base import ModelBundle
    from dtrain.strategies.base import AbstractStrategy

_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16


def around(  # noqa: PLR0913 - it is all that there is
    config: Config,
    bundle: ModelBundle,
    strategy: AbstractStrategy,
    comm: AbstractComm,
    rows: tuple[AbstractStore | Streams, AbstractStore],
    *,
    pad_id: int,
    cache: Path,
    resumed: bool,
    say: Callable[[str], None],
    at: Callable[[Sequence[int]], None],
) -> Around:
    assert isinstance(config.batch.global_batch, int)
    assert config.batch.micro_batch != "auto"
    base = bundle.adapter.switched_off if bundle.adapter is not None and bundle.adapter.pure else None
    return Around(
        module=strategy.module, comm=comm, base=base, copy=lambda: _copy(config, bundle.assets, comm),
        rows=rows, batch=BatchPlan(config.batch.global_batch, config.batch.micro_batch, comm.size), pad_id=pad_id,
        assets=bundle.assets,
        start=lambda: start_digest(config, bundle.assets), cache=cache, resumed=resumed, say=say, at=at,
    )  # fmt: skip


def start_digest(config: Config, assets: Path) -> str:
    """Of the weights that training starts from, and what computes with them; wherever the model's folder lies. Of large
    files some pieces are read.
    """
    import xxhash

    plain = frozen.to_plain(config)
    said: list[Any] = [json.loads((assets / "config.json").read_bytes()), plain["tuning"], config.train.precision]
    if not config.model.trained():
        said += [plain["model"], config.run.seed]
    state = xxhash.xxh3_128(json.dumps(said, sort_keys=True, default=str).encode())
    folders = [assets] * config.model.trained()
    if first := plain["tuning"].get("init_from"):  # its path is in what was said, and others may be there since
        folders.append(Path(first))
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(size * i // _SAMPLES)
                state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _copy(config: Config, assets: Path, comm: AbstractComm) -> nn.Module:
    """The model before training. Collective."""
    dtype = DTYPES[config.train.precision]
    made = config.model.build(assets, seed=config.run.seed)
    made.choose_attention(Setting(comm.device, dtype, config.dataset.packing), comm)
    return whole(made, comm.device, dtype)
