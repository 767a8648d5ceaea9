"""The first back end of a list that keeps documents apart where the model is to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtrain.errors import ModelError
from dtrain.models.attention.base import Asked
from dtrain.models.attention.dense import EAGER, SDPA
from dtrain.models.attention.documents import DOCUMENTS, SCORES
from dtrain.models.attention.flash import FLASH_2, FLASH_3
from dtrain.models.attention.flex import FLEX
from dtrain.models.attention.names import Attention as Name
from dtrain.models.attention.probe import Probe
from dtrain.models.attention.varlen import VARLEN
from dtrain.models.base import Attention, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dtrain.comm import AbstractComm
    from dtrain.models._causal import CausalLM

BACKENDS = (FLASH_3, FLASH_2, VARLEN, DOCUMENTS, FLEX, SCORES, SDPA, EAGER)
"""In the order in which `auto` tries them: fused kernels over all documents, then a call for each length, then by
blocks, then scores as matrices, those of a document before those of a row."""


def choose(
    module: CausalLM, kind: type[PreTrainedModel], name: Name, setting: Setting, comm: AbstractComm
) -> Attention:
    """Have `module`, made of a model of this kind, attend by `name`, or the first that passes where it is `auto`.

    Raises ModelError. Collective: what one rank cannot do, none does.
    """
    config = module.decoder_module.config
    asked = Asked.of(kind, config, setting)
    probe, unproved = _probe(kind, config, setting, comm)
    over: dict[str, str] = {}
    for backend in BACKENDS if name == "auto" else [one for one in BACKENDS if one.name == name]:
        why = backend.lacks(asked)
        if why is None and probe is not None:
            why = probe.fault(backend)
        if why is None and unproved and backend not in (SDPA, EAGER):
            why = "cannot be tried out" if name == "auto" else f"cannot be tried out: {unproved}"
        if (why := first_reason(why, comm)) is None:
            module.attend_by(backend)
            proof = f"not tried out: {unproved}" if unproved else "which keeps documents apart here"
            return Attention(backend.name, proof, over)
        over[backend.name] = why
    raise ModelError(_refused(kind, name, setting, over))


def _probe(
    kind: type[PreTrainedModel], config: object, setting: Setting, comm: AbstractComm
) -> tuple[Probe | None, str | None]:
    """The probe, or why there is none on some rank."""
    probe, why = None, None
    try:
        probe = Probe(kind, config, setting)  # type: ignore[arg-type]
    except ModelError as e:
        why = str(e)
    why = first_reason(why, comm)
    return (probe, None) if why is None else (None, why)


def first_reason(why: str | None, comm: AbstractComm) -> str | None:
    """The reason of the first rank that has one. Collective."""
    said = enumerate(comm.gather(why or ""))
    rank, first = next(((rank, one) for rank, one in said if one), (0, ""))
    return first + (f" (rank {rank})" if rank else "") if first else None


def _refused(kind: type[PreTrainedModel], name: Name, setting: Setting, over: dict[str, str]) -> str:
    if name != "auto":
        return (f"model.attention={name}: {over[name]}; model.attention=auto takes what works for {kind.__name__} on "
                f"{setting.device.type}")  # fmt: skip
    reasons = "".join(f"\n  {one}: {why}" for one, why in over.items())
    way_out = "set dataset.packing=false, or use another model" if setting.packed else "use another model"
    return (f"model.attention=auto: nothing keeps the documents of {kind.__name__} apart on {setting.device.type}; "
            f"{way_out}:{reasons}")  # fmt: skip
