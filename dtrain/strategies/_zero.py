"""Live DeepSpeed ZeRO. Sole importer of deepspeed, and the one place that touches its internals.

Internals used, with the version that they were read in (0.19): `_hp_mapping`, `grad_position`,
`fp32_partitioned_groups_flat`, `fp16_partitioned_groups_flat`, `single_partition_of_fp32_groups`,
`fp32_groups_flat_partition`, `update_lp_params`, `_unflatten_partitioned_parameters`, `invalidate_secondary_tensor`,
`persistent_parameters`, `grad_partitions_flat_buffer`, `_lazy_init_hp_params_optimizer_state`,
`_hp_optimizer_states_linked`, `parameter_offload.partition_all_parameters`, `ops.__compatible_ops__`,
`zero.Init._convert_to_zero_parameters`.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import nn

from dtrain.models.base import DTYPES, AbstractWeights, ModelBundle
from dtrain.strategies._scale import START_SCALE
from dtrain.strategies.base import AbstractStrategy, Optim, Shard, Update, set_lr
from dtrain.strategies.shared import fill, make_state, materialise, updates_of

if TYPE_CHECKING:
    from dtrain.plan.world import World
    from dtrain.strategies.zero import ZeRO


@final
class _ZeRO(AbstractStrategy):
    def __init__(self, spec: ZeRO, world: World, device: torch.device, optim: Optim) -> None:
        self._spec, self._world, self._device, self._optim = spec, world, device, optim
        self._on_nvme = bool(spec.on_nvme())
        self._deepspeed = _import_deepspeed(world, on_nvme=self._on_nvme)

    def wrap(self, bundle: ModelBundle) -> None:
        module, config = bundle.module, self._config()
        dtype = DTYPES[self._optim.precision]
        if self._spec.stage == 3:
            self._partition(module, bundle.weights, config, dtype)
        else:
            materialise(module, self._device, dtype)
        optimizer = self._optim.build(module.named_parameters())
        engine, zero, *_ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.module, self._engine, self._zero = engine, engine, zero
        self._named = dict(module.named_parameters())
        if not self._on_nvme:
            fill(self.shards(), bundle.weights)
            fill(self.frozen_shards(), bundle.weights)
            self.refresh()

    def _partition(
        self, module: nn.Module, weights: AbstractWeights, config: dict[str, Any], dtype: torch.dtype
    ) -> None:
        """Make and divide one parameter at a time. Values come later, into the masters; with NVMe, which keeps the
        masters on disk, at once and in compute precision.
        """
        init = self._deepspeed.zero.Init(config_dict_or_path=config)
        names = iter([name for name, _ in module.named_parameters()]) if self._on_nvme else None

        def divide(param: nn.Parameter) -> None:
            if names is not None:
                param.data.copy_(weights.read(next(names), 0, param.numel()).view(param.shape))
            init._convert_to_zero_parameters([param])

        materialise(module, self._device, dtype, each=divide)

    def micro(self, *, sync: bool) -> AbstractContextManager[None]:
        return nullcontext()  # every engine.step() is a boundary: managed_gradient_accumulation is off

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Update:
        set_lr(self._zero, lr)
        try:
            self._engine.step()
        except Exception as error:  # DeepSpeed has no class of its own for it
            if self._optim.precision == "fp16" and "loss scale" in str(error):
                return Update(math.inf)
            raise
        norm = float(self._engine.get_global_grad_norm())
        if self._spec.stage == 3:
            # A parameter without a gradient in the first micro-batch would start from last step's.
            buffer = getattr(self._zero, "grad_partitions_flat_buffer", None)
            if buffer is not None:
                buffer.zero_()
        applied = self._engine.was_step_applied()
        if not applied and math.isfinite(norm):
            norm = math.inf
        return Update(norm, skipped=not applied and self._optim.precision == "fp16")

    def shards(self) -> Iterator[Shard]:
        assert not self._on_nvme, "state on NVMe has no live views"
        if self._spec.stage != 3 and any(self._zero.optimizer.state.values()):
            # DeepSpeed links the views once, in the middle of its first step, when only the first group has state.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, param in self._named.items():
            if param.requires_grad:
                shard = self._divided(name, param) if self._spec.stage == 3 else self._fragment(name, param)
                if shard is not None:
                    yield shard

    def frozen_shards(self) -> Iterator[Shard]:
        assert not self._on_nvme, "parameters on NVMe have no live views"
        param: Any
        for name, param in self._named.items():
            if param.requires_grad:
                continue
            if self._spec.stage != 3:
                yield Shard(name, tuple(param.shape), 0, {"weight": param.detach().view(-1)})
                continue
            start, numel = self._own(param)
            yield Shard(name, tuple(param.ds_shape), start, {"weight": param.ds_tensor.detach().narrow(0, 0, numel)})

    @staticmethod
    def _own(param: Any) -> tuple[int, int]:
        """Start and length of this rank's part of a divided parameter, without the padding at its end."""
        rank = dist.get_rank(param.ds_process_group)  # noqa: TID251
        start = min(rank * param.partition_numel(), param.ds_numel)
        return start, max(0, min(param.partition_numel(), param.ds_numel - start))

    def _divided(self, name: str, param: Any) -> Shard:
        zero = self._zero
        group, offset, _ = zero.grad_position[zero.get_param_id(param)]
        flat = zero.fp32_partitioned_groups_flat[group]
        start, numel = self._own(param)
        state = zero.optimizer.state.get(flat, {})
        views = {"weight": flat.detach().narrow(0, offset, numel)}
        views |= {key: one.narrow(0, offset, numel) for key, one in state.items() if _shaped(one, flat)}
        return Shard(name, tuple(param.ds_shape), start, views)

    def _fragment(self, name: str, param: Any) -> Shard | None:
        mapping = param._hp_mapping
        if mapping is None:  # this rank owns nothing of it
            return None
        views = {"weight": mapping.hp_fragment.detach()}
        if any(self._zero.optimizer.state.values()):  # else it is of a state that is gone
            states = mapping.optim_fragment or {}
            views |= {key: one for key, one in states.items() if _shaped(one, mapping.hp_fragment)}
        return Shard(name, tuple(param.shape), mapping.lp_fragment_address.start, views)

    def counters(self) -> dict[str, float]:
        said: dict[str, float] = {"updates": updates_of(self._zero.optimizer)}
        if self._optim.precision == "fp16":
            said |= scale_counters(self._zero.loss_scaler)
        return said

    def restore(self, counters: Mapping[str, float]) -> None:
        zero = self._zero
        make_state(zero.optimizer, self._flats(), self._optim.state_names, int(counters["updates"]))
        if self._optim.precision == "fp16":
            restore_scale(zero.loss_scaler, counters)

    def _flats(self) -> list[torch.Tensor]:
        """The flat tensors that the optimizer updates."""
        zero = self._zero
        if self._spec.stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        if hasattr(zero, "single_partition_of_fp32_groups"):
            return list(zero.single_partition_of_fp32_groups)
        return list(zero.fp32_groups_flat_partition)  # stage 1 in bf16 is another class of DeepSpeed's

    def refresh(self) -> None:
        zero = self._zero
        if self._spec.stage != 3:
            zero.update_lp_params()
            return
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(i)
        zero.invalidate_secondary_tensor()
        kept = zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def full_state(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self._spec.stage == 3:
            # A forward fetches ahead, and what it fetched last nobody may have waited for.
            self._zero.parameter_offload.partition_all_parameters()
        for name, param in self._named.items():
            if names is not None and name not in names:
                continue
            full = safe_get_full_fp32_param(param) if param.requires_grad else None
            if full is None:
                with self._deepspeed.zero.GatheredParameters([param], enabled=self._spec.stage == 3):
                    full = param.detach().clone()
            yield name, full.detach().float().cpu().view(getattr(param, "ds_shape", param.shape))

    def _config(self) -> dict[str, Any]:
        """What DeepSpeed is given: written whole by us, so that no default of its own decides."""
        s, precision = self._spec, self._optim.precision
        pin = s.pin_memory and self._device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": s.stage,
            "contiguous_gradients": True,
            "overlap_comm": s.overlap_comm,
            "reduce_bucket_size": s.reduce_bucket_size,
            "allgather_bucket_size": s.allgather_bucket_size,
            "round_robin_gradients": False,
        }
        if s.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": s.prefetch_bucket_size,
                "stage3_param_persistence_threshold": s.param_persistence_threshold,
                "stage3_max_live_parameters": s.max_live_parameters,
                "stage3_max_reuse_distance": s.max_reuse_distance,
                "sub_group_size": s.sub_group_size,
                "memory_efficient_linear": False,  # it would round bf16 differently from the other strategies
                "zero_hpz_partition_size": s.zero_hpz_partition_size,
                "zero_quantized_weights": s.zero_quantized_weights,
                "zero_quantized_gradients": s.zero_quantized_gradients,
            }
        for key in ("offload_optimizer", "offload_param"):
            if (where := getattr(s, key)) != "none":
                zero[key] = {"device": where, "pin_memory": pin} | (
                    {"nvme_path": s.nvme_path} if where == "nvme" else {}
                )
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self._optim.grad_clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # the plan refuses what cannot run on pieces
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {  # as `LossScale`, which the other strategies follow
                "enabled": precision == "fp16",
                "initial_scale_power": int(math.log2(START_SCALE)),
                "loss_scale_window": 1000,
                "hysteresis": 1,
                "min_loss_scale": 1,
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "steps_per_print": 2**31,
        }


def scale_counters(scaler: Any) -> dict[str, float]:
    """Of DeepSpeed's DynamicLossScaler, as `LossScale` counts."""
    return {"loss_scale": scaler.cur_scale, "good_steps": scaler.cur_iter - scaler.last_overflow_iter - 1}


def restore_scale(scaler: Any, counters: Mapping[str, float]) -> None:
    """As `LossScale.restore`."""
    scaler.cur_scale = counters.get("loss_scale", START_SCALE)
    scaler.last_overflow_iter = scaler.cur_iter - int(counters.get("good_steps", 0)) - 1


def look(*, cuda: bool) -> dict[str, Any]:
    """For `dtrain doctor`: its version once it is imported, and whether its op for NVMe could be compiled here."""
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return {"version": deepspeed.__version__, "nvme": bool(AsyncIOBuilder().is_compatible(verbose=False))}


def _shaped(state: object, like: torch.Tensor) -> bool:
    return isinstance(state, torch.Tensor) and state.shape == like.shape


def _import_deepspeed(world: World, *, on_nvme: bool) -> Any:
    """deepspeed, told which device there is and kept from compiling anything at start."""
    if world.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if on_nvme and "TORCH_EXTENSIONS_DIR" not in os.environ:
        # NVMe's op is compiled, and in the shared folder a killed builder's lock makes every later run wait for ever.
        os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="dtrain-torch-extensions-")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    ops = getattr(deepspeed.ops, "__compatible_ops__", None)
    assert isinstance(ops, dict), "deepspeed.ops.__compatible_ops__ is gone: on CPU it would compile an op at start"
    if world.device == "cpu":
        ops["deepspeed_shm_comm"] = False
    return deepspeed
